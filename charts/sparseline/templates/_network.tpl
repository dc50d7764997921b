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
{{- $address := urlParse (include "sparseline.storeEndpoint" .) }}
{{- $port := regexFind ":[0-9]+$" $address.host | trimPrefix ":" }}
- to:
    - ipBlock: {cidr: {{ .Values.objectStore.cidr }}}
  ports:
    - {protocol: TCP, port: {{ default (ternary "443" "80" (eq $address.scheme "https")) $port }}}
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
{{- $address := urlParse (include "sparseline.mlflowUri" .) }}
{{- $port := regexFind ":[0-9]+$" $address.host | trimPrefix ":" }}
- to:
    - ipBlock: {cidr: 0.0.0.0/0}
  ports:
    - {protocol: TCP, port: {{ default (ternary "443" "80" (eq $address.scheme "https")) $port }}}
{{- end }}
{{- end -}}
