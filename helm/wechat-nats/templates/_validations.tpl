{{- /* What the schema cannot say: values that are right alone and wrong together. Each sentence says what to set. */}}
{{- define "wechat-nats.validate" -}}
{{- $v := .Values }}
{{- $faults := list }}
{{- $least := add (ceil $v.drainSeconds) 5 }}
{{- if lt (include "wechat-nats.gracePeriod" . | int64) $least }}
{{- $faults = append $faults (printf "terminationGracePeriodSeconds: set at least %d, drainSeconds and 5 more, or the adapter is killed with work in hand." $least) }}
{{- end }}
{{- if not $v.tokenKey.existingSecret }}
{{- $faults = append $faults (printf "tokenKey.existingSecret: set the Secret with the key that seals bot tokens; keep a copy of it: kubectl -n %s create secret generic %s-token-key --from-literal=%s=\"$(openssl rand -base64 32)\"" .Release.Namespace (include "wechat-nats.fullname" .) $v.tokenKey.key) }}
{{- end }}
{{- $ways := list }}
{{- range $way := list "creds" "nkey" "token" "userPassword" }}
{{- if (index $v.nats.auth $way).existingSecret }}
{{- $ways = append $ways (printf "nats.auth.%s" $way) }}
{{- end }}
{{- end }}
{{- if gt (len $ways) 1 }}
{{- $faults = append $faults (printf "nats.auth: set one way to log in, not %s." (join " and " $ways)) }}
{{- end }}
{{- if and $v.nats.auth.userPassword.user (not $v.nats.auth.userPassword.existingSecret) }}
{{- $faults = append $faults "nats.auth.userPassword.existingSecret: set the Secret with the password of nats.auth.userPassword.user." }}
{{- end }}
{{- if and $v.nats.auth.userPassword.existingSecret (not $v.nats.auth.userPassword.user) }}
{{- $faults = append $faults "nats.auth.userPassword.user: set the user of the password in nats.auth.userPassword.existingSecret." }}
{{- end }}
{{- if and (contains "," $v.nats.url) (not $v.evaluationNats.enabled) (not (hasKey $v.settings "WECHAT_NATS_REPLICAS")) }}
{{- $faults = append $faults "settings.WECHAT_NATS_REPLICAS: set 3, since nats.url names a cluster: with one copy a lost server loses messages, and stops all. 1, if that is meant." }}
{{- end }}
{{- if and $v.nats.tls.ca.existingSecret $v.nats.tls.ca.existingConfigMap }}
{{- $faults = append $faults "nats.tls.ca: set existingSecret or existingConfigMap, not both." }}
{{- end }}
{{- if $v.evaluationNats.enabled }}
{{- if or $ways $v.nats.tls.ca.existingSecret $v.nats.tls.ca.existingConfigMap $v.nats.tls.cert.existingSecret $v.nats.tls.handshakeFirst }}
{{- $faults = append $faults "evaluationNats.enabled: set no nats.auth and no nats.tls with it; the server for evaluation has neither." }}
{{- end }}
{{- if gt (dig "WECHAT_NATS_REPLICAS" 1 $v.settings | int) 1 }}
{{- $faults = append $faults "settings.WECHAT_NATS_REPLICAS: set 1 with evaluationNats.enabled, which is one server." }}
{{- end }}
{{- end }}
{{- if and $v.console.service.enabled (not $v.console.existingSecret) }}
{{- $faults = append $faults "console.existingSecret: set the Secret with the token of the console that console.service makes reachable." }}
{{- end }}
{{- if and $v.podMonitor.enabled $v.serviceMonitor.enabled }}
{{- $faults = append $faults "serviceMonitor.enabled: set it or podMonitor.enabled, not both, or each adapter is scraped twice." }}
{{- end }}
{{- with $v.podDisruptionBudget }}
{{- if and (not (kindIs "invalid" .maxUnavailable)) (not (kindIs "invalid" .minAvailable)) }}
{{- $faults = append $faults "podDisruptionBudget: set maxUnavailable or minAvailable, not both." }}
{{- end }}
{{- end }}
{{- with $v.autoscaling }}
{{- if and .hpa.enabled .keda.enabled }}
{{- $faults = append $faults "autoscaling: set hpa.enabled or keda.enabled, not both; KEDA makes an autoscaler of its own." }}
{{- end }}
{{- if and (or .hpa.enabled .keda.enabled) (gt (int .minReplicas) (int .maxReplicas)) }}
{{- $faults = append $faults "autoscaling.maxReplicas: set at least autoscaling.minReplicas." }}
{{- end }}
{{- if and .keda.enabled (not .keda.prometheusAddress) }}
{{- $faults = append $faults "autoscaling.keda.prometheusAddress: set the address of your Prometheus, such as http://prometheus.monitoring:9090." }}
{{- end }}
{{- end }}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.extraEgress) }}
{{- $open := list }}
{{- range $v.networkPolicy.natsPorts }}
{{- $open = append $open (int .) }}
{{- end }}
{{- range $url := splitList "," (include "wechat-nats.natsUrl" .) }}
{{- $usual := get (dict "ws" "80" "wss" "443") (splitList ":" $url | first) | default "4222" }}
{{- $port := regexFind ":[0-9]+$" (trimSuffix "/" $url) | trimPrefix ":" | default $usual | int }}
{{- if not (has $port $open) }}
{{- $faults = append $faults (printf "networkPolicy.natsPorts: add %d, the port of %s in nats.url, or allow it in extraEgress." $port $url) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $v.console.existingSecret (eq (int $v.console.port) (int $v.http.port)) }}
{{- $faults = append $faults (printf "console.port: set another one than http.port, which is %d too." (int $v.http.port)) }}
{{- end }}
{{- $own := include "wechat-nats.ownEnv" . | fromYaml }}
{{- range $v.extraEnv }}
{{- if hasKey $own .name }}
{{- $faults = append $faults (printf "extraEnv: remove %s, which the chart sets from a value of its own." .name) }}
{{- else if hasPrefix "WECHAT_NATS_" .name }}
{{- $faults = append $faults (printf "extraEnv: set %s in settings, where it is checked." .name) }}
{{- end }}
{{- end }}
{{- if $faults }}
{{- fail (printf "\n\n%s\n" (join "\n" $faults)) }}
{{- end }}
{{- end }}
