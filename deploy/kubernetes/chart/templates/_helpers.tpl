{{/* Labels of everything that the chart makes. */}}
{{- define "hull.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "hull.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/*
The specification of the DaemonSet, for a dictionary of `root` and `remove`. What a pod of it does on its
node is done by init containers, so the pod is ready when it is done; what stays has no rights.
*/}}
{{- define "hull.node" -}}
{{- $values := .root.Values -}}
selector:
  matchLabels: {app: hull-node}
updateStrategy:
  rollingUpdate:
    {{- /* Where hull is to go, no node waits for another one. */}}
    maxUnavailable: {{ .remove | ternary "100%" $values.maxUnavailable }}
template:
  metadata:
    labels: {app: hull-node}
  spec:
    {{- with $values.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $values.tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $values.imagePullSecrets }}
    imagePullSecrets:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    # For systemctl, and for what `hull check` looks at.
    hostPID: true
    {{- /* Never left out: an object that had another one would keep it. */}}
    serviceAccountName: {{ $values.kubectl.image | empty | ternary "default" "hull-node" }}
    automountServiceAccountToken: {{ $values.kubectl.image | empty | not }}
    terminationGracePeriodSeconds: 5
    initContainers:
      {{- if and .remove $values.kubectl.image }}
      {{- include "hull.label" (dict "root" .root "label" "hull.dev/ready-") | nindent 6 }}
      {{- end }}
      - name: hull-node
        image: {{ include "hull.image" .root | quote }}
        args: [{{ .remove | ternary "remove" "install" }}]
        env:
          - name: PREFIX
            value: {{ $values.prefix | quote }}
          - name: RESTART
            value: {{ $values.restart | quote }}
        securityContext: {privileged: true}
        volumeMounts:
          - {name: host, mountPath: /host}
      {{- if and (not .remove) $values.kubectl.image }}
      {{- include "hull.label" (dict "root" .root "label" "hull.dev/ready=true") | nindent 6 }}
      {{- end }}
    containers:
      - name: stay
        image: {{ include "hull.image" .root | quote }}
        args: [stay]
        {{- include "hull.unprivileged" . | nindent 8 }}
    volumes:
      - name: host
        hostPath: {path: /}
{{- end }}

{{/* The container that changes a label of its node: before hull goes, and after it has come. */}}
{{- define "hull.label" -}}
- name: label
  image: {{ .root.Values.kubectl.image | quote }}
  command: [kubectl, label, --overwrite, node, $(NODE), {{ .label }}]
  env:
    - name: NODE
      valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
  {{- include "hull.unprivileged" . | nindent 2 }}
{{- end }}

{{/* What is said of every container but the one that installs hull. */}}
{{- define "hull.unprivileged" -}}
securityContext:
  runAsUser: 65534
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
{{- end }}
