package telemetry_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/telemetry"
)

func TestLogger(t *testing.T) {
	ctx := trace.Extract(t.Context(), map[string][]string{
		"traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
	})
	var out bytes.Buffer
	log, err := telemetry.NewLogger(&out, slog.LevelInfo, telemetry.FormatJSON)
	if err != nil {
		t.Fatal(err)
	}
	log.DebugContext(ctx, "too quiet")
	log.With("agent", "agt_1").InfoContext(ctx, "request ended", "request", "req_1", "token", secret.String("canary"))
	var got map[string]any
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	for key, want := range map[string]string{
		"msg": "request ended", "level": "INFO", "agent": "agt_1", "request": "req_1", "token": "[redacted]",
		"trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331",
	} {
		if got[key] != want {
			t.Errorf("%s = %v, want %q", key, got[key], want)
		}
	}

	out.Reset()
	if log, err = telemetry.NewLogger(&out, slog.LevelInfo, telemetry.FormatText); err != nil {
		t.Fatal(err)
	}
	log.Info("no span")
	if strings.Contains(out.String(), "trace_id") || !strings.Contains(out.String(), `msg="no span"`) {
		t.Errorf("text: %s", out.String())
	}
	log.WithGroup("g").InfoContext(ctx, "in a group")
	if !strings.Contains(out.String(), "g.trace_id=0af7651916cd43dd8448eb211c80319c") {
		t.Errorf("text: %s", out.String())
	}

	if _, err := telemetry.NewLogger(&out, slog.LevelInfo, "xml"); err == nil {
		t.Error("xml is a format")
	}
}
