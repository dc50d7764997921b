{{/* Peers: whole namespaces by name. */}}
{{- define "sparseline.namespaces" -}}
{{- range . }}
- namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ . }}}
{{- end }}
{{- end -}}

{{- define "sparseline.dnsEgress" -}}
- to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: kube-system}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end -}}

{{/* The port of an address, its scheme's own where it names none. */}}
{{- define "sparseline.portOf" -}}
{{- $address := urlParse . -}}
{{- default (ternary "443" "80" (eq $address.scheme "https")) (regexFind ":[0-9]+$" $address.host | trimPrefix ":") -}}
{{- end -}}

{{/* The store and MLflow, wherever they are. */}}
{{- define "sparseline.programEgress" -}}
{{- if include "sparseline.inClusterStore" . }}
- to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: {{ .Release.Namespace }}}
      podSelector:
        matchLabels: {{- include "sparseline.selector" (list . "store") | nindent 10 }}
  ports:
    - {protocol: TCP, port: 9000}
{{- else }}
- to:
    - ipBlock: {cidr: {{ .Values.objectStore.cidr }}}
  ports:
    - {protocol: TCP, port: {{ include "sparseline.portOf" (include "sparseline.storeEndpoint" .) }}}
{{- end }}
{{- if .Values.mlflow.enabled }}
- to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: {{ .Release.Namespace }}}
      podSelector:
        matchLabels: {{- include "sparseline.selector" (list . "mlflow") | nindent 10 }}
  ports:
    - {protocol: TCP, port: 5000}
{{- else }}
- to:
    - ipBlock: {cidr: 0.0.0.0/0}
  ports:
    - {protocol: TCP, port: {{ include "sparseline.portOf" (include "sparseline.mlflowUri" .) }}}
{{- end }}
{{- end -}}
