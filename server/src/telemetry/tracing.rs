//! Where logs and traces go: logs to standard error, traces to an OTLP collector if one is given.

use std::io::IsTerminal as _;
use std::time::Duration;

use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::config::Telemetry;
use crate::error::{Error, Result};

/// For the last spans to leave, beyond the time that a shutdown may take.
const LAST_SPANS: Duration = Duration::from_secs(1);

/// Sends what is left of traces when it is dropped.
#[must_use]
pub struct Guard(Option<SdkTracerProvider>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(provider) = &self.0 {
            // Nobody is left to be told, and a collector that does not answer does not hold up the end.
            let _ = provider.shutdown_with_timeout(LAST_SPANS);
        }
    }
}

/// Sets up the process's logs and traces. Has to run inside the runtime, which carries the exporter's connection.
///
/// # Errors
/// For a filter or an endpoint that makes no sense, or if it was called before.
pub fn init(options: &Telemetry) -> Result<Guard> {
    let filter = EnvFilter::try_new(&options.log).map_err(|error| Error::invalid("--log", error.to_string()))?;
    let format =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let format = if options.json_output {
        format.json().flatten_event(true).with_span_list(false).boxed()
    } else {
        format.boxed()
    };
    let provider = options.otlp_endpoint.as_deref().map(|url| provider(url, &options.otlp_service_name)).transpose()?;
    let traces = provider.as_ref().map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer("plumb")));
    tracing_subscriber::registry()
        .with(format.with_filter(filter))
        // Spans of calls are made at `info`; what a log filter hides is still part of a trace.
        .with(traces.with_filter(tracing_subscriber::filter::LevelFilter::INFO))
        .try_init()
        .map_err(|error| Error::internal(error.to_string()))?;
    Ok(Guard(provider))
}

fn provider(url: &str, service: &str) -> Result<SdkTracerProvider> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(url)
        .build()
        .map_err(|error| Error::invalid("--otlp-endpoint", error.to_string()))?;
    let resource = Resource::builder().with_service_name(service.to_owned()).build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

/// Makes `span` a child of the span that a call's headers name (W3C trace context), if they name one.
pub fn follow_parent(span: &tracing::Span, headers: &http::HeaderMap) {
    if headers.contains_key("traceparent") {
        let parent = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
        // Fails where no collector is set up: then there is no trace to be part of.
        let _ = span.set_parent(parent);
    }
}

struct HeaderExtractor<'a>(&'a http::HeaderMap);

impl Extractor for HeaderExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
