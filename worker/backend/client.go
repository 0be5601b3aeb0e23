package backend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
)

// maxAnswer bounds the answer to anything but a chat completion, in bytes.
const maxAnswer = 16 << 20

// newRequest builds a request to the server. There is no timeout but the context's:
// a generation takes as long as it takes.
func (b *Backend) newRequest(ctx context.Context, method, path string, body []byte) (*http.Request, error) {
	var reader io.Reader
	if body != nil {
		reader = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, b.base+path, reader)
	if err != nil {
		return nil, fmt.Errorf("request %s: %w", path, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if b.config.Key != "" {
		req.Header.Set("Authorization", "Bearer "+b.config.Key.Reveal())
	}
	otel.GetTextMapPropagator().Inject(ctx, propagation.HeaderCarrier(req.Header))
	return req, nil
}

// answer is a server's answer to a request that isn't a chat completion.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// statusError is an answer with a status that isn't 200.
type statusError struct {
	path string
	answer
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%s answered with status %d", e.path, e.status)
}

func (b *Backend) do(ctx context.Context, method, path string, body []byte) (answer, error) {
	req, err := b.newRequest(ctx, method, path, body)
	if err != nil {
		return answer{}, err
	}
	resp, err := b.transport.RoundTrip(req)
	if err != nil {
		return answer{}, fmt.Errorf("%s: %w", path, because(ctx, err))
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return answer{}, fmt.Errorf("%s: %w", path, because(ctx, err))
	}
	if len(text) > maxAnswer {
		return answer{}, fmt.Errorf("%s: answer is over %d bytes", path, maxAnswer)
	}
	return answer{resp.StatusCode, resp.Header, text}, nil
}

// because prefers the reason why a context ended to the error that this caused.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// get decodes the JSON that a path answers with.
func (b *Backend) get(ctx context.Context, path string, into any) error {
	return b.exchange(ctx, http.MethodGet, path, nil, into)
}

// post sends a JSON body and decodes the answer.
func (b *Backend) post(ctx context.Context, path string, body, into any) error {
	raw, ok := body.([]byte)
	if !ok {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return b.exchange(ctx, http.MethodPost, path, raw, into)
}

func (b *Backend) exchange(ctx context.Context, method, path string, body []byte, into any) error {
	a, err := b.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	if a.status != http.StatusOK {
		return &statusError{path, a}
	}
	if err := json.Unmarshal(a.body, into); err != nil {
		return fmt.Errorf("%s: %w", path, errNotJSON)
	}
	return nil
}

// status returns the HTTP status that an error stands for, or 0.
func status(err error) int {
	var e *statusError
	if errors.As(err, &e) {
		return e.status
	}
	return 0
}
