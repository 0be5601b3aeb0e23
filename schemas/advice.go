package schemas

// Advice says what the reader of the code can do, in one or two sentences for the error
// reference.
func (c CodeInfo) Advice() string { return advice[c.Code] }

// advice has an entry for every code of the table.
var advice = map[Code]string{
	CodeModelRequired:             "Name a model; `GET /v1/models` lists them.",
	CodeMessagesRequired:          "Send at least one message.",
	CodeModelDoesNotSupportTools:  "Leave the tools out, or choose a model whose `capabilities.tools` is true.",
	CodeModelDoesNotSupportVision: "Leave the images out, or choose a model whose `capabilities.vision` is true.",
	CodeContextLengthExceeded:     "Shorten the messages or ask for fewer tokens; `context_window` in the list of models is the size.",
	CodeInvalidResponseFormat:     "Use `text`, `json_object` or `json_schema`.",
	CodeKeyInvalid:                "Check for a typing error and for the right host; else ask your admin for a new key.",
	CodeKeyExpired:                "Ask your admin for a new key.",
	CodeKeyMalformed:              "Send the header `Authorization: Bearer sk-ownllm-…`, with the whole key.",
	CodeScopeRequired:             "Use a model that the key is for, or ask your admin to widen its scopes.",
	CodeTenantDisabled:            "Ask whoever runs the service: your organization is suspended.",
	CodeUserDeactivated:           "Ask your admin: the account of the key's owner is switched off.",
	CodeBudgetExceeded:            "Wait for the 1st of next month (UTC), or ask your admin for a larger budget. A retry doesn't help before.",
	CodeConcurrencyLimit:          "Wait for `Retry-After`, and send fewer requests at once.",
	CodeTenantQPSLimit:            "Wait for `Retry-After`; others of your organization send, too.",
	CodeAgentOffline:              "Try again later; if it lasts, have the GPU machine looked at.",
	CodeTunnelDown:                "Try again in a few seconds; the machine's link is being repaired.",
	CodeModelLoading:              "Wait for `Retry-After`, or send `X-OwnLLM-Wait: 60s` to wait in the request.",
	CodeInternalError:             "Try again; if it persists, report the `x-request-id`.",
	CodeInvalidJSON:               "Send one JSON object, unencoded, nested no more than 500 deep.",
	CodeInvalidValue:              "Correct the field that `param` names.",
	CodeModelNotFound:             "Check the name; `GET /v1/models` lists what there is.",
	CodeNotFound:                  "Check the path and the base URL, which ends in `/v1`. In a stream over NATS: the request was cancelled.",
	CodeMethodNotAllowed:          "Use the method that the `Allow` header names.",
	CodeRequestTooLarge:           "Send less: a body of up to 32 MB unless the operator says otherwise, headers of up to 8 KB.",
	CodeTooManyFailures:           "Stop, correct the key or the request, and wait for `Retry-After`.",
	CodeQueueFull:                 "Wait for `Retry-After`: the machine has more to do than it may queue.",
	CodeAgentTimeout:              "Try again, with fewer tokens if the reply was long; read streams without pausing.",
	CodeBackendError:              "Try again; if it persists, have the inference server's log looked at.",
}
