package sdk

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/ssestream"
)

// failures: however the backend fails, before the first token a status says so, after it
// an error in the stream, and never just an end.
func (s goSDK) failures(t *testing.T) {
	for _, fault := range []string{"error_after", "die_after", "end_after"} {
		t.Run("stream "+fault, func(t *testing.T) {
			chunks, err := s.read(t.Context(), s.params(), steer(map[string]any{"tokens": 8, "numbered": true, fault: 3}))
			got := streamError(t, err)
			if got.Type != "internal_error" || got.Code != "backend_error" || got.Param != nil || got.Message == "" {
				t.Errorf("error is %+v", got)
			}
			if len(chunks) < 2 {
				t.Errorf("%d chunks came before it", len(chunks))
			}
		})
	}
	for _, fault := range []map[string]any{{"status": 500}, {"error_after": 3}, {"die_after": 3}, {"die_after": 0}} {
		t.Run(fmt.Sprint("reply ", fault), func(t *testing.T) {
			fault["tokens"] = 8
			_, err := s.Chat.Completions.New(t.Context(), s.params(), steer(fault))
			if got := apiError(t, err); got.StatusCode != 502 || got.Code != "backend_error" {
				t.Errorf("error is %d %s", got.StatusCode, got.RawJSON())
			}
		})
	}
	_, err := s.read(t.Context(), s.params(), steer(map[string]any{"status": 500}))
	if got := apiError(t, err); got.StatusCode != 502 || got.Code != "backend_error" {
		t.Errorf("stream that can't begin: %d %s", got.StatusCode, got.RawJSON())
	}
}

func apiError(t *testing.T, err error) *openai.Error {
	t.Helper()
	var e *openai.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want an API error", err)
	}
	return e
}

type envelope struct {
	Message, Type, Code string
	Param               *string
}

func streamError(t *testing.T, err error) envelope {
	t.Helper()
	var e *ssestream.StreamError
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want an error in the stream", err)
	}
	var body struct{ Error envelope }
	if err := json.Unmarshal(e.Event.Data, &body); err != nil || e.Event.Type != "" {
		t.Fatalf("event %q with data %q: %v", e.Event.Type, e.Event.Data, err)
	}
	return body.Error
}

// attempts counts the requests that the SDK sends.
type attempts struct{ at []time.Time }

func (a *attempts) RoundTrip(r *http.Request) (*http.Response, error) {
	a.at = append(a.at, time.Now())
	return http.DefaultTransport.RoundTrip(r)
}

func (s goSDK) oneCase(t *testing.T, c errorCase, call string) {
	var tries attempts
	opts := []option.RequestOption{option.WithAPIKey(c.Key), option.WithHTTPClient(&http.Client{Transport: &tries})}
	if c.BaseURL != "" {
		opts = append(opts, option.WithBaseURL(c.BaseURL))
	}
	retries := 0
	if c.Retries != nil {
		retries = *c.Retries
		opts = append(opts, option.WithMaxRetries(max(1, retries)))
	}
	p := s.params()
	p.Model = c.Model
	bodyOpts := slices.Clone(opts)
	for name, value := range c.Body {
		bodyOpts = append(bodyOpts, option.WithJSONSet(name, value))
	}
	for _, name := range c.Omit {
		bodyOpts = append(bodyOpts, option.WithJSONDel(name))
	}

	var err error
	switch call {
	case "models":
		_, err = s.Client.Models.List(t.Context(), opts...)
	case "model":
		_, err = s.Client.Models.Get(t.Context(), c.Model, opts...)
	case "chat":
		_, err = s.Chat.Completions.New(t.Context(), p, bodyOpts...)
	case "stream":
		_, err = s.read(t.Context(), p, bodyOpts...)
	default:
		t.Fatalf("case %s: no such call: %q", c.Name, call)
	}

	want := c.Expect
	if want.Status == http.StatusOK {
		got := streamError(t, err)
		if got.Type != want.Type || got.Code != want.Code || !strings.Contains(got.Message, want.Message) {
			t.Errorf("error is %+v", got)
		}
		return
	}
	got := apiError(t, err)
	if got.StatusCode != want.Status || got.Type != want.Type || got.Code != want.Code || got.Param != want.Param {
		t.Errorf("got %d %s, want %+v", got.StatusCode, got.RawJSON(), want)
	}
	if got.Message == "" || !strings.Contains(got.Message, want.Message) {
		t.Errorf("message is %q", got.Message)
	}
	if got.Response.Header.Get("x-request-id") == "" {
		t.Error("no x-request-id")
	}
	for name, pattern := range want.Headers {
		if value := got.Response.Header.Get(name); !regexp.MustCompile(pattern).MatchString(value) {
			t.Errorf("header %s is %q, want %s", name, value, pattern)
		}
	}
	if len(tries.at) != 1+retries {
		t.Fatalf("the SDK tried %d times, want %d", len(tries.at), 1+retries)
	}
	for i, at := range tries.at[1:] {
		seconds, err := strconv.ParseFloat(got.Response.Header.Get("Retry-After"), 64)
		if pause := at.Sub(tries.at[i]); err != nil || pause.Seconds() < 0.9*seconds {
			t.Errorf("tried again after %v; Retry-After: %v s, %v", pause, seconds, err)
		}
	}
}
