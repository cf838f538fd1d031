{{- define "wechat-nats.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "wechat-nats.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "wechat-nats.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "wechat-nats.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "wechat-nats.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride }}
{{- end }}

{{- /* What finds the release's pods; it can never change. With "component": those of one kind. */}}
{{- define "wechat-nats.selectorLabels" -}}
app.kubernetes.io/name: {{ include "wechat-nats.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "wechat-nats.labels" -}}
{{- with .Values.commonLabels }}
{{- toYaml . }}
{{ end -}}
{{ include "wechat-nats.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: wechat-nats
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* Metadata of an object: a dict of "root", "name" and, where they are wanted, "namespace", "component", "labels",
and "annotations". */}}
{{- define "wechat-nats.metadata" -}}
name: {{ .name }}
namespace: {{ .namespace | default (include "wechat-nats.namespace" .root) }}
labels:
  {{- $labels := merge (dict) (.labels | default dict) (include "wechat-nats.labels" .root | fromYaml) }}
  {{- with .component }}
  {{- $_ := set $labels "app.kubernetes.io/component" . }}
  {{- end }}
  {{- toYaml $labels | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Labels of pods: a dict of "root", "component" and "labels". Without the chart's version, which alone would restart
them. */}}
{{- define "wechat-nats.podLabels" -}}
{{- $own := merge (dict "app.kubernetes.io/component" .component) (include "wechat-nats.labels" .root | fromYaml) }}
{{- toYaml (merge (dict) (omit $own "helm.sh/chart") (.labels | default dict)) }}
{{- end }}

{{- define "wechat-nats.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "wechat-nats.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- /* An image: a dict of "root", "image" and "tag". */}}
{{- define "wechat-nats.image" -}}
{{- $registry := default .image.registry .root.Values.global.imageRegistry }}
{{- $name := list $registry .image.repository | compact | join "/" }}
{{- if .image.digest }}
{{- printf "%s@%s" $name .image.digest }}
{{- else }}
{{- printf "%s:%s" $name .tag }}
{{- end }}
{{- end }}

{{- define "wechat-nats.pullSecrets" -}}
{{- with concat .Values.global.imagePullSecrets .Values.image.pullSecrets | uniq }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* A number or text as a variable holds it: YAML's 10737418240 is no 1.073741824e+10. */}}
{{- define "wechat-nats.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}
{{- printf "%d" (int64 .) }}
{{- else }}
{{- toString . }}
{{- end }}
{{- end }}

{{- define "wechat-nats.natsUrl" -}}
{{- if .Values.evaluationNats.enabled }}
{{- printf "nats://%s-nats:4222" (include "wechat-nats.fullname" .) }}
{{- else }}
{{- .Values.nats.url }}
{{- end }}
{{- end }}

{{- define "wechat-nats.gracePeriod" -}}
{{- .Values.terminationGracePeriodSeconds | default (add (ceil .Values.drainSeconds) 15) | int64 }}
{{- end }}

{{- /* Fewest replicas that there ever are. */}}
{{- define "wechat-nats.leastReplicas" -}}
{{- if or .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled }}
{{- .Values.autoscaling.minReplicas | int }}
{{- else }}
{{- .Values.replicaCount | int }}
{{- end }}
{{- end }}

{{- /* Bots per replica at which one more is wanted. */}}
{{- define "wechat-nats.targetBots" -}}
{{- $capacity := dig "WECHAT_NATS_CAPACITY" 10000 .Values.settings }}
{{- max 1 (div (mul (int64 $capacity) (int64 .Values.autoscaling.targetPercent)) 100) }}
{{- end }}

{{- /* The settings, with those that fit a small server where the server is the small one. */}}
{{- define "wechat-nats.settings" -}}
{{- $settings := deepCopy .Values.settings }}
{{- if .Values.evaluationNats.enabled }}
{{- $settings = merge $settings (dict "WECHAT_NATS_IN_MAX_BYTES" 1073741824 "WECHAT_NATS_MEDIA_STORE_BYTES" 1073741824) }}
{{- end }}
{{- toYaml $settings }}
{{- end }}

{{- /* What the chart sets itself, name by name. Secrets are files, never variables: those are inherited and printed. */}}
{{- define "wechat-nats.ownEnv" -}}
{{- $auth := .Values.nats.auth }}
{{- $tls := .Values.nats.tls }}
NATS_URL: {{ include "wechat-nats.natsUrl" . | quote }}
{{- if $auth.creds.existingSecret }}
NATS_CREDS: {{ printf "/etc/wechat-nats/creds/%s" $auth.creds.key | quote }}
{{- end }}
{{- if $auth.nkey.existingSecret }}
NATS_NKEY: {{ printf "/etc/wechat-nats/nkey/%s" $auth.nkey.key | quote }}
{{- end }}
{{- if $auth.token.existingSecret }}
NATS_TOKEN_FILE: {{ printf "/etc/wechat-nats/token/%s" $auth.token.key | quote }}
{{- end }}
{{- if $auth.userPassword.existingSecret }}
NATS_USER: {{ $auth.userPassword.user | quote }}
NATS_PASSWORD_FILE: {{ printf "/etc/wechat-nats/password/%s" $auth.userPassword.key | quote }}
{{- end }}
{{- with .Values.nats.inboxPrefix }}
NATS_INBOX_PREFIX: {{ . | quote }}
{{- end }}
{{- if or $tls.ca.existingSecret $tls.ca.existingConfigMap }}
NATS_CA: {{ printf "/etc/wechat-nats/ca/%s" $tls.ca.key | quote }}
{{- end }}
{{- if $tls.cert.existingSecret }}
NATS_CERT: {{ printf "/etc/wechat-nats/cert/%s" $tls.cert.certKey | quote }}
NATS_KEY: {{ printf "/etc/wechat-nats/cert/%s" $tls.cert.keyKey | quote }}
{{- end }}
{{- if $tls.handshakeFirst }}
NATS_TLS_FIRST: "true"
{{- end }}
WECHAT_NATS_TOKEN_KEY_FILE: {{ printf "/etc/wechat-nats/token-key/%s" .Values.tokenKey.key | quote }}
{{- with .Values.console }}
{{- if .existingSecret }}
WECHAT_NATS_CONSOLE_ADDR: {{ printf "%s:%d" (ternary $.Values.http.address "127.0.0.1" .service.enabled) (int .port) | quote }}
WECHAT_NATS_CONSOLE_TOKEN_FILE: {{ printf "/etc/wechat-nats/console/%s" .key | quote }}
{{- end }}
{{- end }}
WECHAT_NATS_HTTP_ADDR: {{ printf "%s:%d" .Values.http.address (int .Values.http.port) | quote }}
WECHAT_NATS_DRAIN_S: {{ include "wechat-nats.text" .Values.drainSeconds | quote }}
{{- range $name, $value := include "wechat-nats.settings" . | fromYaml }}
{{ $name }}: {{ include "wechat-nats.text" $value | quote }}
{{- end }}
{{- end }}

{{- define "wechat-nats.env" -}}
env:
  {{- range $name, $value := include "wechat-nats.ownEnv" . | fromYaml }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Mounted Secrets by folder, and the entries of each. Whole volumes, not single files: only so a rotated Secret
reaches the running pod. */}}
{{- define "wechat-nats.secrets" -}}
{{- $auth := .Values.nats.auth }}
{{- $tls := .Values.nats.tls }}
creds: {{ dict "name" $auth.creds.existingSecret "keys" (list $auth.creds.key) | toJson }}
nkey: {{ dict "name" $auth.nkey.existingSecret "keys" (list $auth.nkey.key) | toJson }}
token: {{ dict "name" $auth.token.existingSecret "keys" (list $auth.token.key) | toJson }}
password: {{ dict "name" $auth.userPassword.existingSecret "keys" (list $auth.userPassword.key) | toJson }}
ca: {{ dict "name" $tls.ca.existingSecret "keys" (list $tls.ca.key) | toJson }}
cert: {{ dict "name" $tls.cert.existingSecret "keys" (list $tls.cert.certKey $tls.cert.keyKey) | toJson }}
token-key: {{ dict "name" .Values.tokenKey.existingSecret "keys" (list .Values.tokenKey.key) | toJson }}
console: {{ dict "name" .Values.console.existingSecret "keys" (list .Values.console.key) | toJson }}
{{- end }}

{{- define "wechat-nats.volumes" -}}
volumes:
  - name: tmp
    emptyDir:
      sizeLimit: {{ .Values.temporarySize }}
  {{- range $folder, $secret := include "wechat-nats.secrets" . | fromYaml }}
  {{- if $secret.name }}
  - name: {{ $folder }}
    secret:
      secretName: {{ $secret.name }}
      defaultMode: 0440
      items:
        {{- range $secret.keys }}
        - key: {{ . }}
          path: {{ . }}
        {{- end }}
  {{- end }}
  {{- end }}
  {{- with .Values.nats.tls.ca.existingConfigMap }}
  - name: ca
    configMap:
      name: {{ . }}
      items:
        - key: {{ $.Values.nats.tls.ca.key }}
          path: {{ $.Values.nats.tls.ca.key }}
  {{- end }}
  {{- with .Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "wechat-nats.volumeMounts" -}}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  {{- range $folder, $secret := include "wechat-nats.secrets" . | fromYaml }}
  {{- if or $secret.name (and (eq $folder "ca") $.Values.nats.tls.ca.existingConfigMap) }}
  - name: {{ $folder }}
    mountPath: /etc/wechat-nats/{{ $folder }}
    readOnly: true
  {{- end }}
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- /* Where and how a pod of the program runs, in the Deployment and in the test. */}}
{{- define "wechat-nats.scheduling" -}}
{{- range $field := list "nodeSelector" "tolerations" "affinity" "dnsConfig" "hostAliases" "priorityClassName" "runtimeClassName" "schedulerName" "dnsPolicy" }}
{{- with index $.Values $field }}
{{ $field }}: {{ if kindIs "string" . }}{{ . }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* How Prometheus scrapes an adapter; of a PodMonitor or ServiceMonitor. */}}
{{- define "wechat-nats.endpoints" -}}
- port: http
  path: /metrics
  interval: {{ .interval }}
  {{- with .scrapeTimeout }}
  scrapeTimeout: {{ . }}
  {{- end }}
  {{- with .relabelings }}
  relabelings:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .metricRelabelings }}
  metricRelabelings:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
