{{- define "sparseline.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "sparseline.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "sparseline.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "sparseline.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels of an object. Takes (list root component). */}}
{{- define "sparseline.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: sparseline
{{ include "sparseline.selector" . }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "sparseline.selector" -}}
app.kubernetes.io/name: {{ include "sparseline.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* The image of the stages; refuses to go on without a digest where one is required. */}}
{{- define "sparseline.image" -}}
{{- $image := .Values.image -}}
{{- if and $image.requireDigest (not $image.digest) -}}
{{- fail "image.digest is empty and image.requireDigest is true: push the image, then write its digest (`make pin` prints it)" -}}
{{- end -}}
{{- $name := ternary (printf "%s/%s" $image.registry $image.repository) $image.repository (ne $image.registry "") -}}
{{- ternary (printf "%s@%s" $name $image.digest) (printf "%s:%s" $name $image.tag) (ne $image.digest "") -}}
{{- end -}}

{{- define "sparseline.storeImage" -}}
{{- $image := .Values.objectStore.image -}}
{{- if not $image.repository -}}
{{- fail (printf "objectStore.kind %s needs objectStore.image.repository with a tag or a digest" .Values.objectStore.kind) -}}
{{- end -}}
{{- if and .Values.image.requireDigest (not $image.digest) -}}
{{- fail "objectStore.image.digest is empty and image.requireDigest is true" -}}
{{- end -}}
{{- ternary (printf "%s@%s" $image.repository $image.digest) (printf "%s:%s" $image.repository $image.tag) (ne $image.digest "") -}}
{{- end -}}

{{- define "sparseline.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.runAs.user }}
runAsGroup: {{ .Values.runAs.group }}
fsGroup: {{ .Values.runAs.group }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "sparseline.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: {{ .Values.runAs.user }}
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "sparseline.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "sparseline.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "sparseline.inClusterStore" -}}
{{- if ne .Values.objectStore.kind "external" -}}true{{- end -}}
{{- end -}}

{{- define "sparseline.storeEndpoint" -}}
{{- if include "sparseline.inClusterStore" . -}}
{{- if .Values.objectStore.endpoint -}}
{{- fail "objectStore.endpoint is for kind external only; the in-cluster store has its own service" -}}
{{- end -}}
http://{{ include "sparseline.fullname" . }}-store.{{ .Release.Namespace }}.svc:9000
{{- else -}}
{{- required "objectStore.kind external needs objectStore.endpoint, e.g. https://s3.eu-central-1.amazonaws.com" .Values.objectStore.endpoint -}}
{{- end -}}
{{- end -}}

{{- define "sparseline.storeUri" -}}
s3://{{ .Values.objectStore.bucket }}{{ with .Values.objectStore.prefix }}/{{ . }}{{ end }}
{{- end -}}

{{- define "sparseline.storeSecret" -}}
{{- required "objectStore.existingSecret is empty: kubectl create secret generic sparseline-store --from-literal=accesskey=... --from-literal=secretkey=..., then name it" .Values.objectStore.existingSecret -}}
{{- end -}}

{{- define "sparseline.mlflowUri" -}}
{{- if .Values.mlflow.enabled -}}
{{- if .Values.mlflow.externalUri -}}{{- fail "mlflow.externalUri is for mlflow.enabled: false only" -}}{{- end -}}
http://{{ include "sparseline.fullname" . }}-mlflow.{{ .Release.Namespace }}.svc:5000
{{- else -}}
{{- required "mlflow.enabled is false: give mlflow.externalUri" .Values.mlflow.externalUri -}}
{{- end -}}
{{- end -}}

{{/* What the program reads from its surroundings, as data of a ConfigMap. */}}
{{- define "sparseline.settings" -}}
SPARSELINE_STORE: {{ include "sparseline.storeUri" . | quote }}
SPARSELINE_S3_ENDPOINT: {{ include "sparseline.storeEndpoint" . | quote }}
AWS_REGION: {{ .Values.objectStore.region | quote }}
MLFLOW_TRACKING_URI: {{ include "sparseline.mlflowUri" . | quote }}
MLFLOW_DISABLE_TELEMETRY: "true"
DO_NOT_TRACK: "true"
RAY_USAGE_STATS_ENABLED: "0"
{{- with .Values.proxy.http }}
HTTP_PROXY: {{ . | quote }}
{{- end }}
{{- with .Values.proxy.https }}
HTTPS_PROXY: {{ . | quote }}
{{- end }}
{{- with .Values.proxy.noProxy }}
NO_PROXY: {{ . | quote }}
{{- end }}
{{- if .Values.customCA.configMap }}
SSL_CERT_FILE: /etc/sparseline-ca/{{ .Values.customCA.key }}
REQUESTS_CA_BUNDLE: /etc/sparseline-ca/{{ .Values.customCA.key }}
{{- end }}
{{- end -}}

{{- define "sparseline.storeCredentials" -}}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef: {name: {{ include "sparseline.storeSecret" . }}, key: {{ .Values.objectStore.accessKeyKey }}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef: {name: {{ include "sparseline.storeSecret" . }}, key: {{ .Values.objectStore.secretKeyKey }}}
{{- end -}}

{{- define "sparseline.caMount" -}}
{{- if .Values.customCA.configMap }}
- {name: ca, mountPath: /etc/sparseline-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "sparseline.caVolume" -}}
{{- if .Values.customCA.configMap }}
- name: ca
  configMap: {name: {{ .Values.customCA.configMap }}}
{{- end }}
{{- end -}}

{{/* An Ingress with TLS. Takes root, component, name, port, ingress. */}}
{{- define "sparseline.ingress" -}}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "sparseline.labels" (list .root .component) | nindent 4 }}
  {{- with .ingress.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with .ingress.className }}
  ingressClassName: {{ . }}
  {{- end }}
  tls:
    - hosts: [{{ required (printf "%s.ingress.host is empty" .component) .ingress.host | quote }}]
      secretName: {{ required (printf "%s.ingress.tlsSecret is empty; plain HTTP is not offered" .component) .ingress.tlsSecret }}
  rules:
    - host: {{ .ingress.host | quote }}
      http:
        paths:
          - path: /
            pathType: Prefix
            backend:
              service: {name: {{ .name }}, port: {number: {{ .port }}}}
{{- end -}}

{{/* A RoleBinding. Takes root, role, namespace, subjects. */}}
{{- define "sparseline.binding" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .role }}
  namespace: {{ .namespace }}
  labels: {{- include "sparseline.labels" (list .root "access") | nindent 4 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ .role }}}
subjects:
{{- range .subjects }}
  - kind: {{ .kind }}
    name: {{ .name | quote }}
    {{- if eq .kind "ServiceAccount" }}
    namespace: {{ required "a subject of kind ServiceAccount needs its namespace" .namespace }}
    {{- else }}
    apiGroup: rbac.authorization.k8s.io
    {{- end }}
{{- end }}
{{- end -}}
