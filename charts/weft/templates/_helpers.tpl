{{- define "weft.labels" -}}
app.kubernetes.io/name: weft
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "weft.selector" -}}
app.kubernetes.io/name: weft
app.kubernetes.io/component: controller
{{- end }}

{{/* An image by its key in .Values.images. */}}
{{- define "weft.image" -}}
{{- $images := .root.Values.images -}}
{{- $repository := get $images .which -}}
{{- if $images.registry }}{{ $repository = printf "%s/%s" (trimSuffix "/" $images.registry) $repository }}{{ end -}}
{{- printf "%s:%s" $repository ($images.tag | default .root.Chart.AppVersion) -}}
{{- end }}

{{/* Sidecars take nobody else for the controller than the account weft-controller of the namespace weft. */}}
{{- define "weft.namespace" -}}
{{- if ne .Release.Namespace "weft" }}{{ fail (printf "install weft into the namespace weft, not %s: sidecars know the controller by it (helm install weft ... -n weft --create-namespace)" .Release.Namespace) }}{{ end -}}
weft
{{- end }}

{{/* What sidecars are like, as the injector and `weft inject --values` read it. */}}
{{- define "weft.injector" -}}
proxyImage: {{ include "weft.image" (dict "root" . "which" "proxy") | quote }}
initImage: {{ include "weft.image" (dict "root" . "which" "iptables") | quote }}
imagePullPolicy: {{ .Values.images.pullPolicy }}
cni: {{ .Values.cni.enabled }}
trustDomain: {{ .Values.trustDomain | quote }}
log: {{ .Values.proxy.log | quote }}
logFormat: {{ .Values.proxy.logFormat }}
skipOutboundPorts: {{ .Values.proxy.skipOutboundPorts | quote }}
skipOutboundCidrs: {{ .Values.proxy.skipOutboundCidrs | quote }}
prestopSleepSeconds: {{ .Values.injector.prestopSleepSeconds }}
resources: {{ .Values.proxy.resources | toJson }}
env: {{ .Values.proxy.env | toJson }}
{{- end }}
