package chat

import (
	"testing"

	"github.com/ownllm/ownllm/schemas"
)

func TestPromptBound(t *testing.T) {
	const plain = tokensPerPrompt + tokensPerMessage
	for body, want := range map[string]int64{
		`{"model":"m","messages":[{"role":"user","content":"hi"}]}`:                                                                              plain + 2,
		`{"model":"m","messages":[{"role":"user","content":"h\u00e9"}]}`:                                                                         plain + 3,
		`{"model":"m","messages":[{"role":"user","content":"hi"},{"role":"user","content":""}]}`:                                                 plain + tokensPerMessage + 2,
		`{"model":"m","messages":[{"role":"user","content":"hi"}],"tools":[{"type":"function","function":{"name":"f"}}]}`:                        plain + 2 + tokensForTools + int64(len(`[{"type":"function","function":{"name":"f"}}]`)),
		`{"model":"m","messages":[{"role":"user","content":"hi"}],"response_format":{"type":"json_object"}}`:                                     plain + 2 + int64(len(`{"type":"json_object"}`)),
		`{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"hi"},{"type":"image_url","image_url":{"url":"http://x"}}]}]}`: plain + 2 + tokensPerImage,
	} {
		r, err := Parse(body)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.PromptBound(); got != want {
			t.Errorf("the bound of %s is %d, want %d", body, got, want)
		}
	}
}

func TestReplyLimit(t *testing.T) {
	for body, want := range map[string]int64{`"n":1`: 0, `"n":3,"max_tokens":10`: 30, `"max_completion_tokens":7`: 7} {
		r, err := Parse(`{"model":"m","messages":[{"role":"user","content":"hi"}],` + body + `}`)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.ReplyLimit(); got != want {
			t.Errorf("the limit of %s is %d, want %d", body, got, want)
		}
		if got := r.MostTokens(schemas.Model{ContextWindow: 100}); got != int64(100*r.N) {
			t.Errorf("%s may have %d tokens", body, got)
		}
	}
}
