// Package schemas is the contract of OwnLLM: error codes, identifiers, bus
// subjects, wire types, JSON Schemas and SQL migrations.
//
// It is the lowest floor of the house: it imports nothing of the project, does no
// input or output, and starts no goroutine. Every subject, header and error code
// is built and parsed here and nowhere else, so that whoever reads this package
// knows all that the parts say to each other.
//
// # The bus
//
// Everything lives under the prefix "ownllm.v1.". Payloads are one line of JSON
// (the head), optionally followed by raw bytes: a job's head is followed by the
// client's body, a frame's head by OpenAI chunks, one JSON object per line. A
// person can read all of it with the nats command line, and neither side has to
// parse what it only passes on.
package schemas
