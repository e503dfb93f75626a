#!/usr/bin/env python3
"""Writes plumb.json, the Grafana dashboard, from the panels below. With --check it says whether the file is that.

Panels stand in rows of 24 columns, as in Grafana. `$namespace`, `$job`, `$instance`, `$model` and `$version` are the
dashboard's variables. All namespaces are also that of servers without one.
"""

import json
import pathlib
import sys

PATH = pathlib.Path(__file__).with_name("plumb.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

JOB = 'namespace=~"$namespace",job=~"$job"'
SERVER = f'{JOB},instance=~"$instance"'
MODEL = f'{SERVER},model=~"$model"'
VERSION = f'{MODEL},version=~"$version"'
# Rewards of the rules are those of all servers of a job.
RULE = f'{JOB},model=~"$model",version=~"$version"'
WINDOW = "[$__rate_interval]"

STATES = ["unknown", "start", "loading", "warming", "available", "draining", "ended", "failed"]
STATE_COLOURS = ["text", "yellow", "yellow", "yellow", "green", "orange", "text", "red"]


def rate(metric, by, labels=SERVER):
    return f"sum by ({by}) (rate({metric}{{{labels}}}{WINDOW}))"


def quantiles(metric, labels):
    buckets = rate(f"{metric}_bucket", "le", labels)
    return [(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99)]


def ratio(part, part_labels, whole, whole_labels):
    return f"{rate(part, 'model', part_labels)} / {rate(whole, 'model', whole_labels)}"


def mean(metric, by, labels):
    return f"{rate(f'{metric}_sum', by, labels)} / {rate(f'{metric}_count', by, labels)}"


def panel(kind, title, targets, *, unit="short", width=6, height=8, about="", **more):
    return {
        "kind": kind,
        "title": title,
        "targets": [targets] if isinstance(targets, tuple) else targets,
        "unit": unit,
        "width": width,
        "height": height,
        "about": about,
    } | more


def lines(title, targets, **more):
    return panel("timeseries", title, targets, **more)


def stat(title, targets, **more):
    return panel("stat", title, targets, width=4, height=4, **more)


def latency(title, metric, about, labels=MODEL):
    return lines(title, quantiles(metric, labels), unit="s", about=about)


ROWS = {
    "Now": [
        stat(
            "Serving",
            (f"min(plumb_ready{{{SERVER}}})", ""),
            states={0: ("NOT SERVING", "red"), 1: ("SERVING", "green")},
        ),
        stat("Calls", (f"sum(rate(plumb_requests_total{{{SERVER}}}{WINDOW}))", ""), unit="reqps"),
        stat(
            "Refused",
            (
                f"sum(rate(plumb_admission_refusals_total{{{SERVER}}}{WINDOW})) or vector(0)",
                "",
            ),
            unit="reqps",
        ),
        stat("Slowest hundredth", quantiles("plumb_request_duration_seconds", SERVER)[2], unit="s"),
        stat("Tokens computed", (f"sum(rate(plumb_batch_tokens_sum{{{MODEL}}}{WINDOW}))", ""), unit="short"),
        stat("Admitted work takes", (f"max(plumb_admission_wait_seconds{{{SERVER}}})", ""), unit="s"),
    ],
    "Calls": [
        lines("Calls by rpc", (rate("plumb_requests_total", "rpc"), "{{rpc}}"), unit="reqps"),
        lines("Calls by code", (rate("plumb_requests_total", "code"), "{{code}}"), unit="reqps"),
        lines(
            "Refusals by reason",
            [
                (rate("plumb_admission_refusals_total", "reason"), "{{reason}}"),
                (rate("plumb_connections_refused_total", "reason"), "connection: {{reason}}"),
            ],
            unit="reqps",
            about="Why admission turned calls away; callers are told when to come back.",
        ),
        lines("Calls in flight", (f"sum by (rpc) (plumb_requests_in_flight{{{SERVER}}})", "{{rpc}}")),
    ],
    "Latency": [
        latency("Whole call", "plumb_request_duration_seconds", "From arrival to the end of the answer.", SERVER),
        latency("Queue", "plumb_queue_duration_seconds", "The longest wait of a call's items for a batch."),
        latency("Tokenize", "plumb_tokenize_duration_seconds", "Rendering and tokenizing of a call's items."),
        latency("Inference", "plumb_inference_duration_seconds", "From a call's first batch to the end of its last."),
    ],
    "Batches and queue": [
        lines(
            "Tokens",
            [
                (rate("plumb_input_tokens_sum", "model", MODEL), "{{model}} in"),
                (rate("plumb_prefix_cached_tokens_total", "model", VERSION), "{{model}} found in the cache"),
                (rate("plumb_generated_tokens_total", "model", VERSION), "{{model}} generated"),
            ],
            about="Each second.",
        ),
        lines(
            "Queue, tokens",
            [
                (f"sum(plumb_queue_tokens{{{SERVER}}})", "waiting"),
                (f"sum(plumb_admitted_prompt_tokens{{{SERVER}}})", "admitted"),
                (f"sum(plumb_admission_limit_tokens{{{SERVER}}})", "limit"),
            ],
            about="Of prompts, which others wait behind. Tokens that are to be generated have no part in it.",
        ),
        lines(
            "Queue, sequences",
            [
                (f"sum(plumb_queue_sequences{{{SERVER}}})", "waiting"),
                (f"sum(plumb_admission_clients{{{SERVER}}})", "clients"),
            ],
        ),
        lines(
            "Found in the cache",
            [
                (
                    ratio("plumb_prefix_hits_total", VERSION, "plumb_prefix_lookups_total", VERSION),
                    "{{model}} sequences",
                ),
                (
                    ratio("plumb_prefix_cached_tokens_total", VERSION, "plumb_input_tokens_sum", MODEL),
                    "{{model}} tokens",
                ),
            ],
            unit="percentunit",
        ),
        lines(
            "Tokens in a batch",
            [
                *quantiles("plumb_batch_tokens", MODEL)[:2],
                (mean("plumb_batch_tokens", "model", MODEL), "{{model}} mean"),
            ],
        ),
        lines(
            "Sequences in a batch",
            [
                *quantiles("plumb_batch_sequences", MODEL)[:2],
                (mean("plumb_batch_sequences", "model", MODEL), "{{model}} mean"),
            ],
        ),
        lines("Time of a batch", quantiles("plumb_batch_duration_seconds", MODEL), unit="s"),
        lines(
            "Batches that failed",
            [
                (rate("plumb_batch_failures_total", "model, version", VERSION), "{{model}} {{version}} failed"),
                (
                    rate("plumb_isolated_inputs_total", "model, version", VERSION),
                    "{{model}} {{version}} inputs isolated",
                ),
            ],
            about="Each second. An input that makes batches fail is found and answered as an error.",
        ),
    ],
    "Models": [
        panel(
            "state-timeline",
            "States",
            (f"max by (model, version) (plumb_model_state{{{VERSION}}})", "{{model}} {{version}}"),
            states=dict(enumerate(zip(STATES, STATE_COLOURS))),
        ),
        lines(
            "Rewards by version",
            (rate("plumb_reward_count", "model, version", VERSION), "{{model}} {{version}}"),
            about="Each second: how calls are split between versions, and when a new one takes over.",
        ),
        lines(
            "Swaps and loads",
            [
                (f"sum by (model) (plumb_model_swaps_total{{{MODEL}}})", "{{model}} swaps"),
                (f"sum by (model) (plumb_model_rollbacks_total{{{MODEL}}})", "{{model}} rolled back"),
                (f"sum by (model, code) (plumb_model_loads_total{{{MODEL}}})", "{{model}} loads {{code}}"),
            ],
            about="Since the servers started.",
        ),
        lines(
            "Load time",
            (
                f"sum by (model) (plumb_model_load_duration_seconds_sum{{{MODEL}}})"
                f" / sum by (model) (plumb_model_load_duration_seconds_count{{{MODEL}}})",
                "{{model}} mean",
            ),
            unit="s",
        ),
    ],
    "Rewards": [
        panel(
            "heatmap",
            "Rewards",
            (f"sum by (le) (increase(plumb_reward_bucket{{{VERSION}}}{WINDOW}))", "{{le}}"),
            about="How many of each size; choose a model and a version above.",
        ),
        lines("Mean reward by version", (mean("plumb_reward", "model, version", VERSION), "{{model}} {{version}}")),
        lines(
            "Drift",
            [
                (f"plumb:reward_drift:versions{{{RULE}}}", "{{model}} {{version}} from other versions"),
                (f"plumb:reward_drift:yesterday{{{RULE}}}", "{{model}} {{version}} from a day before"),
            ],
            unit="percentunit",
            about="Kolmogorov-Smirnov distance of a version's rewards of the last hour from those of the model's other "
            "versions in the last day, and from its own a day before: the largest difference between two cumulative "
            "distributions, 0 to 1. From rules.yml.",
        ),
        lines(
            "Values that are no numbers",
            [
                (rate("plumb_non_finite_total", "model, version", VERSION), "{{model}} {{version}} NaN or infinite"),
                (rate("plumb_item_failures_total", "model, code", MODEL), "{{model}} items failed {{code}}"),
            ],
            about="Each second.",
        ),
    ],
    "Memory": [
        lines("Process", (f"plumb_resident_memory_bytes{{{SERVER}}}", "{{instance}}"), unit="bytes", width=8),
        lines(
            "Versions",
            (
                f"sum by (model, version, device) (plumb_model_resident_bytes{{{VERSION}}}) > 0",
                "{{model}} {{version}} {{device}}",
            ),
            unit="bytes",
            width=8,
        ),
        lines(
            "Parts",
            [
                (f"sum(plumb_model_weight_bytes{{{VERSION}}})", "weights"),
                (f"sum(plumb_model_cache_bytes{{{VERSION}}})", "keys and values"),
            ],
            unit="bytes",
            width=8,
        ),
    ],
    "GPU, from NVIDIA's DCGM exporter": [
        lines("Busy", ("DCGM_FI_DEV_GPU_UTIL / 100", "{{Hostname}} {{gpu}}"), unit="percentunit"),
        lines("Tensor cores busy", ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "{{Hostname}} {{gpu}}"), unit="percentunit"),
        lines("Memory in use", ("DCGM_FI_DEV_FB_USED * 1048576", "{{Hostname}} {{gpu}}"), unit="bytes"),
        lines("Power", ("DCGM_FI_DEV_POWER_USAGE", "{{Hostname}} {{gpu}}"), unit="watt"),
    ],
}
# Rows that are folded until somebody wants them.
FOLDED = {"GPU, from NVIDIA's DCGM exporter"}


def mappings(states):
    options = {
        str(value): {"text": text, "color": colour, "index": at}
        for at, (value, (text, colour)) in enumerate(states.items())
    }
    return [{"type": "value", "options": options}]


OPTIONS = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
    "state-timeline": {"mergeValues": True, "showValue": "auto", "legend": {"showLegend": False}},
    "heatmap": {
        "calculate": False,
        "yAxis": {"unit": "short"},
        "color": {"mode": "scheme", "scheme": "Blues"},
        "cellGap": 0,
    },
}


def grafana_panel(spec, number, x, y):
    """A panel as Grafana's schema has it."""
    kind = spec["kind"]
    defaults = {"unit": spec["unit"]}
    if kind == "timeseries":
        defaults |= {"min": 0} if spec["title"] != "Mean reward by version" else {}
        defaults["custom"] = {"fillOpacity": 8, "lineWidth": 1, "showPoints": "never"}
    if "states" in spec:
        defaults |= {"mappings": mappings(spec["states"]), "color": {"mode": "thresholds"}}
        defaults["thresholds"] = {"mode": "absolute", "steps": [{"color": "text", "value": None}]}
    targets = [
        {
            "datasource": SOURCE,
            "refId": chr(ord("A") + at),
            "expr": expr,
            "legendFormat": legend,
            "format": "heatmap" if kind == "heatmap" else "time_series",
            "range": True,
        }
        for at, (expr, legend) in enumerate(spec["targets"])
    ]
    return {
        "id": number,
        "type": kind,
        "title": spec["title"],
        "description": spec["about"],
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": spec["width"], "h": spec["height"]},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": OPTIONS[kind],
        "targets": targets,
    }


def panels():
    """All of them, placed from left to right and from top to bottom."""
    placed, number, y = [], 0, 0
    for title, specs in ROWS.items():
        number += 1
        row = {"id": number, "type": "row", "title": title, "collapsed": title in FOLDED, "panels": []}
        row["gridPos"] = {"x": 0, "y": y, "w": 24, "h": 1}
        placed.append(row)
        x, y, height = 0, y + 1, 0
        for spec in specs:
            number += 1
            if x + spec["width"] > 24:
                x, y, height = 0, y + height, 0
            (row["panels"] if row["collapsed"] else placed).append(grafana_panel(spec, number, x, y))
            x, height = x + spec["width"], max(height, spec["height"])
        y += height
    return placed


def variable(name, label, query):
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 3,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard():
    swaps = {
        "name": "Swaps",
        "enable": True,
        "iconColor": "purple",
        "datasource": SOURCE,
        "expr": f"changes(plumb_model_active_version{{{MODEL}}}[$__interval]) > 0",
        "titleFormat": "another version",
        "textFormat": "{{model}} at {{instance}}",
    }
    return {
        "uid": "plumb",
        "title": "Plumb",
        "description": "A preference-model scoring service: calls, latency, batches, models and rewards.",
        "tags": ["plumb"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [swaps]},
        "templating": {
            "list": [
                {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"},
                variable("namespace", "Namespace", "label_values(plumb_build_info, namespace)"),
                variable("job", "Job", 'label_values(plumb_build_info{namespace=~"$namespace"}, job)'),
                variable("instance", "Server", f"label_values(plumb_build_info{{{JOB}}}, instance)"),
                variable("model", "Model", f"label_values(plumb_model_state{{{SERVER}}}, model)"),
                variable("version", "Version", f"label_values(plumb_model_state{{{MODEL}}}, version)"),
            ]
        },
        "panels": panels(),
    }


def main():
    text = json.dumps(dashboard(), indent=2) + "\n"
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if PATH.read_text() == text else f"{PATH.name} is stale; run {pathlib.Path(__file__).name}")
    PATH.write_text(text)


if __name__ == "__main__":
    main()
