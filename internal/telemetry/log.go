package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"go.opentelemetry.io/otel/trace"
)

// Format is the form of the log.
type Format string

const (
	// FormatText is key=value, for people.
	FormatText Format = "text"
	// FormatJSON is one object a line, for machines.
	FormatJSON Format = "json"
)

// NewLogger returns a logger that writes to w what is at least as severe as level,
// and adds trace_id and span_id of the context that the …Context methods get. The
// format must be one of the two above.
func NewLogger(w io.Writer, level slog.Leveler, format Format) (*slog.Logger, error) {
	options := &slog.HandlerOptions{Level: level}
	switch format {
	case FormatText:
		return slog.New(traceHandler{slog.NewTextHandler(w, options)}), nil
	case FormatJSON:
		return slog.New(traceHandler{slog.NewJSONHandler(w, options)}), nil
	}
	return nil, fmt.Errorf("log format %q is neither %q nor %q", format, FormatText, FormatJSON)
}

// traceHandler adds the ids of the current span to every record.
type traceHandler struct{ slog.Handler }

// Handle implements slog.Handler.
func (h traceHandler) Handle(ctx context.Context, r slog.Record) error {
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		r.AddAttrs(slog.String("trace_id", sc.TraceID().String()), slog.String("span_id", sc.SpanID().String()))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h traceHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return traceHandler{h.Handler.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler. The house opens no groups; in one, the ids of
// the span would be inside it.
func (h traceHandler) WithGroup(name string) slog.Handler {
	return traceHandler{h.Handler.WithGroup(name)}
}
