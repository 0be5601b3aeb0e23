package trace

import (
	"context"
	"net/textproto"
	"strings"

	"go.opentelemetry.io/otel/propagation"
)

// w3c reads and writes traceparent and tracestate. Baggage is left out on purpose:
// it would carry whatever a client sends to every backend.
var w3c propagation.TraceContext

// Carrier gives access to trace context in the headers of a NATS message. NATS
// compares header names by case, Go publishers write "Traceparent", and the W3C and
// everyone else "traceparent": so both are read, and the lower-case form is written.
// A nil Carrier may be read.
type Carrier map[string][]string

// Get implements propagation.TextMapCarrier.
func (c Carrier) Get(key string) string {
	for _, name := range [...]string{strings.ToLower(key), textproto.CanonicalMIMEHeaderKey(key)} {
		if values := c[name]; len(values) > 0 {
			return values[0]
		}
	}
	return ""
}

// Set implements propagation.TextMapCarrier. It leaves no other form of the name
// behind, so that no reader finds an older value.
func (c Carrier) Set(key, value string) {
	delete(c, textproto.CanonicalMIMEHeaderKey(key))
	c[strings.ToLower(key)] = []string{value}
}

// Keys implements propagation.TextMapCarrier.
func (c Carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for key := range c {
		keys = append(keys, key)
	}
	return keys
}

// Inject writes the trace context of ctx into headers, which must not be nil. If
// ctx has none it writes nothing.
func Inject(ctx context.Context, header map[string][]string) { w3c.Inject(ctx, Carrier(header)) }

// Extract returns ctx with the trace context of the headers. If they hold none, or
// a malformed one, it returns ctx as it is.
func Extract(ctx context.Context, header map[string][]string) context.Context {
	return w3c.Extract(ctx, Carrier(header))
}
