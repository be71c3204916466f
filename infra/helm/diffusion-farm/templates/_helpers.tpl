{{- define "farm.name" -}}
{{- if contains "farm" .Release.Name -}}{{ .Release.Name | trunc 30 | trimSuffix "-" }}
{{- else -}}{{ printf "%s-farm" .Release.Name | trunc 30 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "farm.selector" -}}
app.kubernetes.io/name: diffusion-farm
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "farm.labels" -}}
{{ include "farm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "farm.image" -}}
{{- $image := index .root.Values.images .of -}}
{{- if $image.digest -}}{{ $image.repository }}@{{ $image.digest }}
{{- else -}}{{ $image.repository }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "farm.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "farm.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "farm.secret" -}}
{{- .Values.secrets.existingSecret | default (include "farm.name" .) }}
{{- end }}

{{- /* The secrets given as values; fails with the name of a missing one. */ -}}
{{- define "farm.secretData" -}}
{{- $given := .Values.secrets.values -}}
{{- range $key := list "FARM_DATABASE_URL" "FARM_BROKER_URL" -}}
{{- $_ := required (printf "give secrets.existingSecret, or secrets.values.%s" $key) (index $given $key) -}}
{{- end -}}
{{- if .Values.flower.enabled -}}
{{- $_ := required "give secrets.values.FLOWER_BASIC_AUTH as user:password, or flower.enabled=false" $given.FLOWER_BASIC_AUTH -}}
{{- end -}}
{{- $url := $given.KEDA_POSTGRESQL_URL | default (regexReplaceAll "^postgres(ql)?([+][a-z0-9]+)?://" $given.FARM_DATABASE_URL "postgresql://") -}}
{{- toYaml (merge (dict "KEDA_POSTGRESQL_URL" $url) $given) }}
{{- end }}

{{- /* Environment of a process: root, secret (its name), keys (of the secret), and settings (more FARM_*). */ -}}
{{- define "farm.env" -}}
{{- $root := .root -}}
{{- $secret := .secret -}}
{{- range $key := .keys }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ $key }}
      {{- if hasPrefix "FARM_S3_" $key }}
      optional: true
      {{- end }}
{{- end }}
{{- $s3 := $root.Values.s3 }}
{{- $settings := dict "FARM_S3_BUCKET" $s3.bucket "FARM_S3_REGION" $s3.region }}
{{- with $s3.endpointUrl }}{{ $_ := set $settings "FARM_S3_ENDPOINT_URL" . }}{{ end }}
{{- with $s3.publicEndpointUrl }}{{ $_ := set $settings "FARM_S3_PUBLIC_ENDPOINT_URL" . }}{{ end }}
{{- range $name, $value := mergeOverwrite $settings $root.Values.settings (.settings | default dict) }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "farm.serviceKeys" -}}
["FARM_DATABASE_URL", "FARM_BROKER_URL", "FARM_S3_ACCESS_KEY_ID", "FARM_S3_SECRET_ACCESS_KEY"]
{{- end }}

{{- define "farm.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "farm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "farm.podMetadata" -}}
labels:
  {{- include "farm.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .pool }}
  farm/pool: {{ . }}
  {{- end }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  {{- if not .root.Values.secrets.existingSecret }}
  farm/secret: {{ include "farm.secretData" .root | sha256sum }}
  {{- end }}
  {{- with .root.Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "farm.podStart" -}}
serviceAccountName: {{ include "farm.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "farm.podSecurity" . | nindent 2 }}
{{- end }}

{{- define "farm.preStop" -}}
{{- with .Values.preStopSeconds }}
lifecycle:
  preStop:
    sleep: {seconds: {{ . }}}
{{- end }}
{{- end }}

{{- /* A pool's values over the defaults. */ -}}
{{- define "farm.pool" -}}
{{- $scaling := mergeOverwrite (deepCopy .root.Values.poolDefaults.scaling) (.pool.scaling | default dict) -}}
{{- $cache := mergeOverwrite (deepCopy .root.Values.poolDefaults.cache) (.pool.cache | default dict) -}}
{{- $settings := mergeOverwrite (deepCopy .root.Values.poolDefaults.settings) (.pool.settings | default dict) -}}
{{- /* Replace these as a whole: merging two sets of resources would give neither. */ -}}
{{- $own := dict "scaling" $scaling "cache" $cache "settings" $settings -}}
{{- range $key, $default := .root.Values.poolDefaults -}}
{{- if not (hasKey $own $key) -}}
{{- $_ := set $own $key (ternary (index $.pool $key) $default (hasKey $.pool $key)) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $own "models" .pool.models -}}
{{- toYaml $own }}
{{- end }}
