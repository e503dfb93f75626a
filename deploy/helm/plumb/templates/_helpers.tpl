{{- define "plumb.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "plumb.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "plumb.serviceAccountName" -}}
{{- default (ternary (include "plumb.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{/* Of the servers' pods. */}}
{{- define "plumb.selector" -}}
app.kubernetes.io/name: {{ include "plumb.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{/* Of Envoy's pods. */}}
{{- define "plumb.envoySelector" -}}
app.kubernetes.io/name: {{ include "plumb.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: envoy
{{- end -}}

{{- define "plumb.releaseLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "plumb.labels" -}}
{{ include "plumb.selector" . }}
{{ include "plumb.releaseLabels" . }}
{{- end -}}

{{/* What the chart sets in the server's configuration, as YAML. */}}
{{- define "plumb.ownConfig" -}}
hostname: {{ .Values.hostname | quote }}
port: 50051
prometheus-port: 9000
json-output: true
lame-duck-secs: {{ .Values.shutdown.lameDuckSecs }}
drain-timeout-secs: {{ .Values.shutdown.drainTimeoutSecs }}
{{- with .Values.models }}
model:
{{- range $name, $source := . }}
  - {{ printf "%s=%s" $name $source | quote }}
{{- end }}
{{- end }}
{{- if ne .Values.modelRoot.type "none" }}
model-root: {{ .Values.modelRoot.mountPath }}
{{- end }}
{{- if .Values.http.enabled }}
http-port: {{ .Values.http.port }}
{{- end }}
{{- with .Values.auth }}
{{- with .apiKeys }}
api-key-file: /etc/plumb/auth/{{ . }}
{{- end }}
{{- with .adminApiKeys }}
admin-api-key-file: /etc/plumb/auth/{{ . }}
{{- end }}
{{- with .tokens }}
auth-tokens-file: /etc/plumb/auth/{{ . }}
{{- end }}
{{- end }}
{{- with .Values.tls }}
{{- if .existingSecret }}
tls-cert: /etc/plumb/tls/{{ .cert }}
tls-key: /etc/plumb/tls/{{ .key }}
{{- if .clientCa }}
tls-client-ca: /etc/plumb/tls/{{ .clientCa }}
tls-client-auth: {{ .clientAuth }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Each option with the value that decides on it, or "" if nothing may: what is set twice might not match. */}}
{{- define "plumb.owned" -}}
config: config
hostname: hostname
port: ""
prometheus-port: ""
port-file: ""
print-config: ""
lame-duck-secs: shutdown.lameDuckSecs
drain-timeout-secs: shutdown.drainTimeoutSecs
model: models
model-id: models
model-root: modelRoot
http-port: http
api-key: auth
api-key-file: auth
admin-api-key: auth
admin-api-key-file: auth
auth-tokens-file: auth
tls-cert: tls
tls-key: tls
tls-client-ca: tls
tls-client-auth: tls
{{- end -}}

{{/* The server's configuration file. JSON's strings, numbers and lists of them are TOML's. */}}
{{- define "plumb.toml" -}}
{{- $config := dict -}}
{{- range $key, $value := .Values.config -}}
{{- $_ := set $config ($key | replace "_" "-") $value -}}
{{- end -}}
{{- if and (not .Values.envoy.enabled) (not (hasKey $config "max-connection-age-secs")) -}}
{{/* A connection stays with one replica: it ends, so that new ones get their part. What streams on it has an hour. */}}
{{- $config = merge $config (dict "max-connection-age-secs" 300 "max-connection-age-grace-secs" 3600) -}}
{{- end -}}
{{- range $key, $value := merge (include "plumb.ownConfig" . | fromYaml) $config -}}
{{ $key }} = {{ toJson $value }}
{{ end }}
{{- end -}}

{{/* Fails where values contradict each other. */}}
{{- define "plumb.check" -}}
{{- $given := list -}}
{{- range $key, $_ := .Values.config -}}
{{- $given = append $given ($key | replace "_" "-") -}}
{{- end -}}
{{- range .Values.extraArgs -}}
{{- if hasPrefix "--" . -}}
{{- $given = append $given (. | trimPrefix "--" | splitList "=" | first) -}}
{{- end -}}
{{- end -}}
{{- range .Values.env -}}
{{- if hasPrefix "PLUMB_" .name -}}
{{- $given = append $given (.name | trimPrefix "PLUMB_" | lower | replace "_" "-") -}}
{{- end -}}
{{- end -}}
{{- range $option, $value := include "plumb.owned" . | fromYaml -}}
{{- if has $option $given -}}
{{- if $value -}}
{{- fail (printf "%s is set by the value %s alone" $option $value) -}}
{{- end -}}
{{- fail (printf "%s is the chart's own" $option) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.cache.persistent (ne .Values.kind "StatefulSet") -}}
{{- fail "cache.persistent takes kind: StatefulSet" -}}
{{- end -}}
{{- if and (gt (int .Values.gpu.count) 1) (not (hasKey .Values.config "device")) -}}
{{- fail "with several GPUs, config.device says which models are on which, such as [\"cuda:0,cuda:1\"]" -}}
{{- end -}}
{{- if and (eq .Values.probes.readiness "grpc") .Values.tls.existingSecret -}}
{{- fail "probes.readiness: kubelet speaks no TLS to grpc health; take http" -}}
{{- end -}}
{{- if and (or .Values.auth.apiKeys .Values.auth.adminApiKeys .Values.auth.tokens) (not .Values.auth.existingSecret) -}}
{{- fail "auth.existingSecret names the Secret that has these keys" -}}
{{- end -}}
{{- if and .Values.auth.existingSecret (not (or .Values.auth.apiKeys .Values.auth.adminApiKeys .Values.auth.tokens)) -}}
{{- fail "auth.existingSecret: say by auth.apiKeys, auth.adminApiKeys or auth.tokens what is in it" -}}
{{- end -}}
{{- if and .Values.envoy.enabled .Values.tls.existingSecret -}}
{{- fail "envoy.enabled: this Envoy speaks plain HTTP/2 to replicas; with tls, let clients or a gateway reach them" -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- fail "autoscaling.minReplicas is more than autoscaling.maxReplicas" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (not .Values.serviceMonitor.enabled) -}}
{{- fail "autoscaling.enabled takes serviceMonitor.enabled, whose labels its query asks for" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- fail "grpcRoute.parentRefs names the Gateway" -}}
{{- end -}}
{{- end -}}

{{- define "plumb.gracePeriod" -}}
{{- with .Values.shutdown -}}
{{ add (int .lameDuckSecs) (int .drainTimeoutSecs) (int .marginSecs) }}
{{- end -}}
{{- end -}}

{{- define "plumb.readiness" -}}
{{- if eq .Values.probes.readiness "auto" -}}
{{ ternary "http" "grpc" (not (empty .Values.tls.existingSecret)) }}
{{- else -}}
{{ .Values.probes.readiness }}
{{- end -}}
{{- end -}}

{{- define "plumb.image" -}}
{{- $tag := printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" (gt (int .Values.gpu.count) 0)) -}}
{{ .Values.image.repository }}:{{ default $tag .Values.image.tag }}
{{- end -}}
