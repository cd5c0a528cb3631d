{{- define "baton.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- /* 41 characters at most: KubeRay cuts "<name>-head-svc" to 50, and the address must match it. */ -}}
{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 41 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "baton.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 41 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 41 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "baton.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* What a selector may use. Selectors can't change, so nothing here may differ between versions.
Takes a dict of root and component. */ -}}
{{- define "baton.selectorLabels" -}}
app.kubernetes.io/name: {{ include "baton.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: baton
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- /* Image of a component. Takes a dict of root and image (the overrides). A digest belongs to one
image, so it is not taken over by a component that names another. */ -}}
{{- define "baton.image" -}}
{{- $base := .root.Values.image -}}
{{- $repository := default $base.repository .image.repository -}}
{{- $tag := default (default .root.Chart.AppVersion $base.tag) .image.tag -}}
{{- $digest := .image.digest -}}
{{- if not (or .image.repository .image.tag .image.digest) -}}
{{- $digest = $base.digest -}}
{{- end -}}
{{- if $digest -}}
{{- printf "%s@%s" $repository $digest | quote -}}
{{- else -}}
{{- printf "%s:%s" $repository $tag | quote -}}
{{- end -}}
{{- end -}}

{{- define "baton.pullPolicy" -}}
{{- default .root.Values.image.pullPolicy .image.pullPolicy -}}
{{- end -}}

{{- /* How many Baton workers a pool has. */ -}}
{{- define "baton.poolSize" -}}
{{- mul .replicas .workersPerReplica -}}
{{- end -}}

{{- define "baton.rayAddress" -}}
{{- if .Values.ray.address -}}
{{- .Values.ray.address -}}
{{- else if .Values.ray.enabled -}}
{{- printf "ray://%s-head-svc:10001" (include "baton.fullname" .) -}}
{{- else -}}
{{- fail "ray.address is required when ray.enabled is false" -}}
{{- end -}}
{{- end -}}

{{- /* Settings that the chart gives in the environment or as an argument, which come before those in
the file: there they would do nothing. */ -}}
{{- define "baton.refuseConfigWithoutEffect" -}}
{{- $instead := dict
  "model" "set the value model"
  "host" "the router listens on every address of its pod"
  "port" "set the value router.port"
  "prefill" "set the values prefill.replicas and prefill.workersPerReplica"
  "decode" "set the values decode.replicas and decode.workersPerReplica"
  "keep_workers" "workers always outlive a router here"
  "ray_address" "set the values ray.enabled=false and ray.address"
  "redis_url" "set the values redis.enabled=false and redis.externalUrl or redis.existingSecret"
-}}
{{- range $name, $_ := .Values.config -}}
{{- with get $instead $name -}}
{{- fail (printf "config.%s has no effect, for the chart sets it: %s" $name .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Environment that tells Baton where Redis is. */ -}}
{{- define "baton.redisEnv" -}}
{{- $redis := .Values.redis -}}
{{- if and $redis.enabled $redis.existingSecret -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $redis.existingSecret }}
      key: {{ $redis.existingSecretPasswordKey }}
- name: BATON_REDIS_URL
  value: redis://:$(REDIS_PASSWORD)@{{ include "baton.fullname" . }}-redis:6379/0
{{- else if $redis.enabled -}}
- name: BATON_REDIS_URL
  value: redis://{{ include "baton.fullname" . }}-redis:6379/0
{{- else if $redis.existingSecret -}}
- name: BATON_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ $redis.existingSecret }}
      key: {{ $redis.existingSecretUrlKey }}
{{- else -}}
- name: BATON_REDIS_URL
  value: {{ required "redis.externalUrl or redis.existingSecret is required when redis.enabled is false" $redis.externalUrl | quote }}
{{- end -}}
{{- end -}}

{{- define "baton.huggingFaceEnv" -}}
{{- with .Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingFace.existingSecretKey }}
{{- end }}
{{- end -}}

{{- /* The root file system is read-only: Ray, vLLM and Triton write to these two. */ -}}
{{- define "baton.volumes" -}}
- name: tmp
  emptyDir: {}
- name: home
{{- if .Values.cache.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.cache.existingClaim }}
{{- else if .Values.cache.sizeLimit }}
  emptyDir:
    sizeLimit: {{ .Values.cache.sizeLimit }}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end -}}

{{- define "baton.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/baton
{{- end -}}

{{- /* Where a pod may run. Takes the component's values. */ -}}
{{- define "baton.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- /* Flags of `ray start`. Every value is a string that KubeRay pastes into a shell command, so
the JSON is quoted once for the shell and once for YAML. Takes the pool's values. */ -}}
{{- define "baton.rayStartParams" -}}
{{- $resources := deepCopy .rayResources -}}
{{- with .accelerator -}}
{{- $_ := set $resources (printf "accelerator_type:%s" .) 1 -}}
{{- end -}}
{{- with $resources -}}
{{- /* Helm reads numbers as floats, and would write a large one as 1e+06: Ray wants integers. */ -}}
{{- $counts := dict -}}
{{- range $name, $count := . -}}{{- $_ := set $counts $name (int $count) -}}{{- end }}
resources: {{ toJson $counts | quote | squote }}
{{- end }}
{{- range $name, $value := .rayStartParams }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- /* Pod template of a Ray pod. Takes a dict of root, component, values and head. */ -}}
{{- define "baton.rayPod" -}}
metadata:
  labels:
    {{- include "baton.labels" . | nindent 4 }}
  {{- with .values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "baton.serviceAccountName" .root }}
  automountServiceAccountToken: false
  # As in the router: a Service named baton would set BATON_PORT.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .values.terminationGracePeriodSeconds }}
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml .root.Values.podSecurityContext | nindent 4 }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" .head }}
      image: {{ include "baton.image" (dict "root" .root "image" .values.image) }}
      imagePullPolicy: {{ include "baton.pullPolicy" (dict "root" .root "image" .values.image) }}
      securityContext:
        {{- toYaml .root.Values.containerSecurityContext | nindent 8 }}
      env:
        - name: HOME
          value: /home/baton
        {{- include "baton.huggingFaceEnv" .root | trim | nindent 8 }}
        {{- with .values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- if .head }}
        - name: gcs
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: client
          containerPort: 10001
        {{- end }}
        - name: metrics
          containerPort: 8080
      lifecycle:
        preStop:
          exec:
            {{- if .head }}
            command: ["/bin/sh", "-c", "ray stop"]
            {{- else }}
            # `ray stop` takes up to 16 s, and 2 s to kill each of three kinds of processes, once
            # it has started.
            {{- $drain := sub .values.terminationGracePeriodSeconds 30 | max 0 }}
            command: ["/bin/sh", "-c", "python -m cluster.pod_end {{ $drain }}; ray stop"]
            {{- end }}
      resources:
        {{- toYaml .values.resources | nindent 8 }}
      volumeMounts:
        {{- include "baton.volumeMounts" . | nindent 8 }}
  volumes:
    {{- include "baton.volumes" .root | nindent 4 }}
  {{- include "baton.placement" .values | nindent 2 }}
{{- end -}}
