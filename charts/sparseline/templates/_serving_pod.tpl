{{/* The pod of a server, the same for a Deployment and for an InferenceService. */}}
{{- define "sparseline.servingPod" -}}
{{- $serving := .Values.serving -}}
{{- $version := toString $serving.version -}}
serviceAccountName: {{ include "sparseline.fullname" . }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: 60
{{- with $serving.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- include "sparseline.pullSecrets" . }}
{{- include "sparseline.placement" $serving }}
securityContext: {{- include "sparseline.podSecurity" . | nindent 2 }}
containers:
  - name: {{ ternary "kserve-container" "serving" (eq $serving.kind "kserve") }}
    image: {{ include "sparseline.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: [python, -m, components.serving]
    args:
      - --model=models:/{{ $serving.model }}{{ ternary (printf "/%s" $version) (printf "@%s" $version) (regexMatch "^[0-9]+$" $version) }}
      {{- with $serving.digest }}
      - --digest={{ . }}
      {{- end }}
      - --host=0.0.0.0
      - --port=8080
      - --dtype={{ $serving.dtype }}
      - --device={{ ternary "cuda" "cpu" (gt (int $serving.gpus) 0) }}
      - --max-sequences={{ $serving.maxSequences }}
      - --max-sequence-tokens={{ $serving.maxSequenceTokens }}
      - --max-waiting={{ $serving.maxWaiting }}
      {{- with $serving.servedModelName }}
      - --served-model-name={{ . }}
      {{- end }}
    envFrom:
      - configMapRef: {name: {{ include "sparseline.fullname" . }}-settings}
    env:
      - {name: HOME, value: /tmp}
      - {name: SPARSELINE_RUNS, value: /cache}
      - {name: SPARSELINE_MODEL, value: {{ $serving.model | quote }}}
      {{- include "sparseline.storeCredentials" . | nindent 6 }}
    ports:
      - {name: http, containerPort: 8080}
    startupProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 5
      failureThreshold: {{ div $serving.startSeconds 5 }}
    readinessProbe:
      httpGet: {path: /v1/models, port: http}
      periodSeconds: 5
      timeoutSeconds: 5
    livenessProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 20
      timeoutSeconds: 10
      failureThreshold: 6
    securityContext: {{- include "sparseline.containerSecurity" . | nindent 6 }}
    resources:
      requests:
        {{- toYaml $serving.resources.requests | nindent 8 }}
      limits:
        {{- toYaml $serving.resources.limits | nindent 8 }}
        {{- if gt (int $serving.gpus) 0 }}
        {{ $serving.gpuResource }}: {{ $serving.gpus }}
        {{- end }}
    volumeMounts:
      - {name: cache, mountPath: /cache}
      - {name: tmp, mountPath: /tmp}
      {{- include "sparseline.caMount" . | nindent 6 }}
volumes:
  - name: cache
    emptyDir: {sizeLimit: {{ $serving.cacheSize }}}
  - name: tmp
    emptyDir: {sizeLimit: 1Gi}
  {{- include "sparseline.caVolume" . | nindent 2 }}
{{- end -}}
