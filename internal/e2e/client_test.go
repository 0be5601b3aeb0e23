package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"
)

// client is an HTTP client that hides nothing, unlike an SDK.
type client struct {
	base string // with /v1
	key  string
	http *http.Client
	// header is sent along with every request.
	header http.Header
}

func newClient(base, key string) *client {
	return &client{base: base, key: key, http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true}}}
}

// close ends the idle connections.
func (c *client) close() { c.http.CloseIdleConnections() }

// chatBody is a chat request for the demo model, with what the caller adds.
func chatBody(stream bool, fields map[string]any) []byte {
	body := map[string]any{
		"model": "demo", "stream": stream,
		"messages": []map[string]string{{"role": "user", "content": "Hello"}},
	}
	for k, v := range fields {
		body[k] = v
	}
	b, err := json.Marshal(body)
	if err != nil {
		panic(err)
	}
	return b
}

// post sends a request. The caller closes the body.
func (c *client) post(ctx context.Context, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, c.header)
	req.Header.Set("Authorization", "Bearer "+c.key)
	req.Header.Set("Content-Type", "application/json")
	return c.http.Do(req)
}

// apiError is the error envelope.
type apiError struct {
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"`
	Code    string  `json:"code"`
}

// reply is what came of a chat request.
type reply struct {
	status   int
	header   http.Header
	id       string
	text     string
	finish   string
	usage    int // completion tokens, if the reply told them
	prompt   int // and those of the prompt
	roles    int // deltas of a stream that have a role
	done     bool
	comments int
	err      *apiError // of the status, or in the stream
	broken   error     // the connection broke
	first    time.Duration
}

type chatChunk struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Choices []struct {
		Delta struct {
			Role      string `json:"role"`
			Content   string `json:"content"`
			Reasoning string `json:"reasoning_content"`
		} `json:"delta"`
		Message struct {
			Content string `json:"content"`
		} `json:"message"`
		FinishReason string `json:"finish_reason"`
	} `json:"choices"`
	Usage *struct {
		PromptTokens     int `json:"prompt_tokens"`
		CompletionTokens int `json:"completion_tokens"`
	} `json:"usage"`
	Error *apiError `json:"error"`
}

// chat sends a chat request and reads the whole reply, checking the form of every
// event of a stream on the way.
func (c *client) chat(ctx context.Context, stream bool, fields map[string]any) reply {
	return c.follow(ctx, stream, fields, func(*reply) {})
}

// follow is chat, and calls seen with what there is of the reply after each event of a
// stream.
func (c *client) follow(ctx context.Context, stream bool, fields map[string]any, seen func(*reply)) reply {
	start := time.Now()
	resp, err := c.post(ctx, "/chat/completions", chatBody(stream, fields))
	if err != nil {
		return reply{broken: err}
	}
	defer resp.Body.Close()
	r := reply{status: resp.StatusCode, header: resp.Header}
	if resp.StatusCode != http.StatusOK || !stream {
		return r.whole(resp.Body)
	}
	lines := bufio.NewReader(resp.Body)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			if !errors.Is(err, io.EOF) || line != "" {
				r.broken = fmt.Errorf("after %q: %w", line, err)
			}
			return r
		}
		line = strings.TrimSuffix(line, "\n")
		switch {
		case line == "":
		case strings.HasPrefix(line, ":"):
			r.comments++
		case line == "data: [DONE]":
			r.done = true
		case strings.HasPrefix(line, "data: "):
			if r.first == 0 {
				r.first = time.Since(start)
			}
			if err := r.event(strings.TrimPrefix(line, "data: ")); err != nil {
				r.broken = err
				return r
			}
			seen(&r)
		default:
			r.broken = fmt.Errorf("line %q isn't of a stream", line)
			return r
		}
	}
}

func (r reply) whole(body io.Reader) reply {
	b, err := io.ReadAll(body)
	if err != nil {
		r.broken = err
		return r
	}
	var v chatChunk
	if err := json.Unmarshal(b, &v); err != nil {
		r.broken = fmt.Errorf("body %q: %w", b, err)
		return r
	}
	r.id, r.err, r.done = v.ID, v.Error, v.Error == nil
	if len(v.Choices) > 0 {
		r.text, r.finish = v.Choices[0].Message.Content, v.Choices[0].FinishReason
	}
	if v.Usage != nil {
		r.usage, r.prompt = v.Usage.CompletionTokens, v.Usage.PromptTokens
	}
	return r
}

// event takes in one event of a stream.
func (r *reply) event(data string) error {
	if r.done || r.err != nil {
		return fmt.Errorf("event %q after the end", data)
	}
	var v chatChunk
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		return fmt.Errorf("event %q: %w", data, err)
	}
	if v.Error != nil {
		r.err = v.Error
		return nil
	}
	if r.id == "" {
		r.id = v.ID
		if len(v.Choices) == 0 || v.Choices[0].Delta.Role != "assistant" {
			return fmt.Errorf("first event %q has no role", data)
		}
	}
	if v.ID != r.id || v.Object != "chat.completion.chunk" {
		return fmt.Errorf("event %q isn't of reply %s", data, r.id)
	}
	for _, choice := range v.Choices {
		r.text += choice.Delta.Content
		if choice.Delta.Role != "" {
			r.roles++
		}
		if choice.FinishReason != "" {
			r.finish = choice.FinishReason
		}
	}
	if v.Usage != nil {
		r.usage, r.prompt = v.Usage.CompletionTokens, v.Usage.PromptTokens
	}
	return nil
}

// request is the id of the request.
func (r *reply) request() string { return r.header.Get("X-Request-Id") }

// code is that of the error, or empty.
func (r *reply) code() string {
	if r.err == nil {
		return ""
	}
	return r.err.Code
}

// wantWhole fails the test unless the reply is complete.
func wantWhole(t *testing.T, r reply) {
	t.Helper()
	if r.broken != nil || r.err != nil || r.status != http.StatusOK || !r.done {
		t.Errorf("reply isn't whole: status %d, error %+v, broken %v, done %v, text %.60q", r.status, r.err, r.broken, r.done, r.text)
	}
}

// numbered is the text of a numbered reply of n tokens.
func numbered(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, " %d", i)
	}
	return b.String()
}
