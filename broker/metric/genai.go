package metric

import "go.opentelemetry.io/otel/attribute"

// The names, attributes and buckets of the GenAI semantic conventions that OwnLLM
// uses. They are our own constants because the conventions are still in
// development and no released Go package has them any more.
const (
	// NameServerDuration is how long a request took, as its client saw it, in seconds.
	NameServerDuration = "gen_ai.server.request.duration"
	// NameServerFirstToken is the time to first token, in seconds.
	NameServerFirstToken = "gen_ai.server.time_to_first_token"
	// NameServerPerToken is the mean time for each token after the first, in seconds.
	NameServerPerToken = "gen_ai.server.time_per_output_token"
	// NameTokenUsage is how many tokens a request burnt, by type.
	NameTokenUsage = "gen_ai.client.token.usage"
	// NameBackendDuration is how long a worker's call of its backend took, in seconds.
	NameBackendDuration = "gen_ai.client.operation.duration"
	// NameBackendFirstChunk is how long a worker waited for the backend's first
	// chunk, in seconds.
	NameBackendFirstChunk = "gen_ai.client.operation.time_to_first_chunk"

	attrOperation = attribute.Key("gen_ai.operation.name")
	attrProvider  = attribute.Key("gen_ai.provider.name")
	attrModel     = attribute.Key("gen_ai.request.model")
	attrTokenType = attribute.Key("gen_ai.token.type")
	attrErrorType = attribute.Key("error.type")
)

var (
	bucketsDuration   = []float64{0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92}
	bucketsFirstToken = []float64{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10}
	bucketsPerToken   = []float64{0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5}
	bucketsTokens     = []float64{1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864}
)
