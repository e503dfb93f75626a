{{/* The pod of a replica, for a Deployment and for a StatefulSet. */}}
{{- define "plumb.pod" -}}
metadata:
  annotations:
    checksum/config: {{ include "plumb.toml" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  labels:
    {{- include "plumb.selector" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "plumb.serviceAccountName" . }}
  automountServiceAccountToken: false
  # Those of a Service by the name of plumb would set PLUMB_PORT.
  enableServiceLinks: false
  # The server needs no preStop hook: it goes on serving for shutdown.lameDuckSecs after SIGTERM.
  terminationGracePeriodSeconds: {{ include "plumb.gracePeriod" . }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.gpu.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or .Values.tolerations .Values.gpu.count }}
  tolerations:
    {{- if .Values.gpu.count }}
    - key: {{ .Values.gpu.resource }}
      operator: Exists
      effect: NoSchedule
    {{- end }}
    {{- with .Values.tolerations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  topologySpreadConstraints:
    {{- if .Values.topologySpreadConstraints }}
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "plumb.selector" $ | nindent 10 }}
    {{- end }}
    {{- end }}
  {{- with .Values.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: plumb
      image: {{ include "plumb.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      {{- with .Values.extraArgs }}
      args:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      env:
        - name: PLUMB_CONFIG
          value: /etc/plumb/config/plumb.toml
        - name: HF_HOME
          value: /data/huggingface
        {{- if .Values.gpu.count }}
        # What the driver compiles for a GPU that is newer than the program; its own choice cannot be written.
        - name: CUDA_CACHE_PATH
          value: /data/cuda
        {{- end }}
        {{- if and (dig "requests" "cpu" "" .Values.resources) (not (dig "limits" "cpu" "" .Values.resources)) (not (hasKey .Values.config "threads")) }}
        # Without a limit the server would take the machine's cores for its own.
        - name: PLUMB_THREADS
          valueFrom:
            resourceFieldRef:
              resource: requests.cpu
        {{- end }}
        {{- with .Values.huggingFace }}
        {{- if .existingSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ .existingSecret }}
              key: {{ .key }}
        {{- end }}
        {{- end }}
        {{- with .Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .Values.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: grpc
          containerPort: 50051
        - name: metrics
          containerPort: 9000
        {{- if .Values.http.enabled }}
        - name: http
          containerPort: {{ .Values.http.port }}
        {{- end }}
      # Probes of the port of the metrics need neither TLS nor a key.
      startupProbe:
        httpGet:
          path: /healthz
          port: metrics
        periodSeconds: 2
        failureThreshold: {{ max 1 (div (add (int .Values.probes.startupSecs) 1) 2) }}
      livenessProbe:
        httpGet:
          path: /healthz
          port: metrics
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      readinessProbe:
        {{- if eq (include "plumb.readiness" .) "grpc" }}
        grpc:
          port: 50051
        {{- else }}
        httpGet:
          path: /readyz
          port: metrics
        {{- end }}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: 2
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      resources:
        {{- $gpus := dict }}
        {{- if .Values.gpu.count }}
        {{- $gpus = dict "limits" (dict .Values.gpu.resource .Values.gpu.count) }}
        {{- end }}
        {{- toYaml (merge $gpus .Values.resources) | nindent 8 }}
      volumeMounts:
        - name: config
          mountPath: /etc/plumb/config
          readOnly: true
        - name: data
          mountPath: /data
        - name: tmp
          mountPath: /tmp
        {{- if gt (int .Values.gpu.count) 1 }}
        - name: shm
          mountPath: /dev/shm
        {{- end }}
        {{- if ne .Values.modelRoot.type "none" }}
        - name: models
          mountPath: {{ .Values.modelRoot.mountPath }}
          readOnly: true
        {{- end }}
        {{- if .Values.auth.existingSecret }}
        - name: auth
          mountPath: /etc/plumb/auth
          readOnly: true
        {{- end }}
        {{- if .Values.tls.existingSecret }}
        - name: tls
          mountPath: /etc/plumb/tls
          readOnly: true
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with .Values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "plumb.fullname" . }}
    {{- if not .Values.cache.persistent }}
    - name: data
      emptyDir:
        sizeLimit: {{ .Values.cache.size }}
    {{- end }}
    # A model that comes with the server is unpacked here while it is read.
    - name: tmp
      emptyDir: {}
    {{- if gt (int .Values.gpu.count) 1 }}
    # NCCL's.
    - name: shm
      emptyDir:
        medium: Memory
    {{- end }}
    {{- with .Values.modelRoot }}
    {{- if ne .type "none" }}
    - name: models
      {{- if eq .type "existingClaim" }}
      persistentVolumeClaim:
        claimName: {{ .existingClaim }}
      {{- else if eq .type "claim" }}
      persistentVolumeClaim:
        claimName: {{ include "plumb.fullname" $ }}-models
      {{- else if eq .type "hostPath" }}
      hostPath:
        path: {{ .hostPath }}
        type: Directory
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- end }}
    {{- end }}
    {{- with .Values.auth.existingSecret }}
    - name: auth
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- with .Values.tls.existingSecret }}
    - name: tls
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
