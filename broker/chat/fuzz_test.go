package chat

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// view is how a backend written in Go reads a request.
type view struct {
	Model         string `json:"model"`
	Stream        bool   `json:"stream"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	MaxTokens           *float64          `json:"max_tokens"`
	MaxCompletionTokens *float64          `json:"max_completion_tokens"`
	N                   *float64          `json:"n"`
	Tools               []json.RawMessage `json:"tools"`
	Messages            []struct {
		Role    string          `json:"role"`
		Content json.RawMessage `json:"content"`
	} `json:"messages"`
}

// text is the length of the text that the backend sees.
func (v *view) text(t *testing.T) (total int, image bool) {
	for _, m := range v.Messages {
		var s string
		var parts []struct {
			Type string `json:"type"`
			Text string `json:"text"`
		}
		switch {
		case len(m.Content) == 0:
		case m.Content[0] == '"':
			if err := json.Unmarshal(m.Content, &s); err != nil {
				t.Fatalf("content: %v", err)
			}
			total += len(s)
		case m.Content[0] == '[':
			// A part that we don't know may have a text that isn't a string.
			if json.Unmarshal(m.Content, &parts) == nil {
				for _, p := range parts {
					total += len(p.Text)
					image = image || p.Type == "image_url"
				}
			}
		}
	}
	return total, image
}

// FuzzParse holds what Parse accepts against encoding/json, which takes the last of
// two keys and ignores case.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `[`, `{"model":"m"`, withContent(`"hi"`), withContent(`[{"type":"text","text":"h\u00e9\ud83d\ude00"},{"type":"image_url","image_url":{"url":"x"}}]`),
		with(`"stream":true,"stream_options":{"include_usage":true},"n":2,"max_tokens":1e1,"stop":["a"],"tools":[{"type":"function"}]`),
		with(`"Model":"z"`), with(`"mod\u0065l":"z"`), with("\"me\u017f\u017fages\":[]"), with(`"response_format":{"type":"json_schema","json_schema":{}}`),
		with(`"x":"\ud800"`), with(`"a":[[[[{"b":[1,-2.5e+3,true,false,null]}]]]]`), "{\"model\":\"\xff\"}", benchmarkBody(700),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, body string) {
		r, err := Parse(body)
		if err != nil {
			var e *schemas.Error
			if e = schemas.AsError(err); e.Code == schemas.CodeInternalError || e.Message == "" {
				t.Fatalf("Parse(%q): %v isn't an error of the contract", body, err)
			}
			if e.Code == schemas.CodeInvalidJSON && utf8.ValidString(body) && json.Valid([]byte(body)) &&
				strings.HasPrefix(strings.TrimLeft(body, " \t\r\n"), "{") && !strings.Contains(body, `\u`) && !deeper(body, maxDepth) {
				t.Fatalf("Parse(%q): %v, but it is valid JSON", body, err)
			}
			return
		}
		if !json.Valid([]byte(body)) || !gjson.Parse(body).IsObject() {
			t.Fatalf("Parse accepted %q", body)
		}
		var v view
		if err := json.Unmarshal([]byte(body), &v); err != nil {
			t.Fatalf("Parse accepted %q: encoding/json: %v", body, err)
		}
		if r.Model != v.Model || r.Model != gjson.Get(body, "model").Str {
			t.Fatalf("model of %q is %q, encoding/json has %q", body, r.Model, v.Model)
		}
		if r.Stream != v.Stream || r.IncludeUsage != v.StreamOptions.IncludeUsage {
			t.Fatalf("stream of %q is %t, %t, encoding/json has %t, %t", body, r.Stream, r.IncludeUsage, v.Stream, v.StreamOptions.IncludeUsage)
		}
		if r.Messages != len(v.Messages) || r.HasTools != (len(v.Tools) > 0) && !strings.Contains(body, "functions") {
			t.Fatalf("%q has %d messages, encoding/json has %d", body, r.Messages, len(v.Messages))
		}
		limit := 0.0
		for _, p := range []*float64{v.MaxTokens, v.MaxCompletionTokens} {
			if p != nil {
				limit = *p
			}
		}
		if float64(r.MaxTokens) != limit || v.N != nil && float64(r.N) != *v.N {
			t.Fatalf("%q has max_tokens %d and n %d, encoding/json has %v and %v", body, r.MaxTokens, r.N, limit, v.N)
		}
		total, image := v.text(t)
		if r.TextBytes < total || r.leastText() > r.TextBytes {
			t.Fatalf("%q has %d bytes of text, at least %d; encoding/json has %d", body, r.TextBytes, r.leastText(), total)
		}
		if image && r.Images == 0 {
			t.Fatalf("%q has an image that Parse didn't see", body)
		}
		_ = r.CheckModel(schemas.Model{ContextWindow: 1, Capabilities: schemas.Capabilities{Tools: true, Vision: true}})
	})
}
