package sdk

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/param"
	"github.com/openai/openai-go/v3/shared"
)

// goSDK is the official Go SDK, pointed at a target.
type goSDK struct {
	target
	openai.Client
}

type (
	chatParams = openai.ChatCompletionNewParams
	chatChunk  = openai.ChatCompletionChunk
)

const pixel = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="

func newGoSDK(to target) goSDK {
	return goSDK{to, openai.NewClient(
		option.WithBaseURL(to.BaseURL),
		option.WithAPIKey(to.APIKey),
		option.WithMaxRetries(0), // so that a failure shows as it is
		option.WithRequestTimeout(time.Minute),
	)}
}

func checkGoSDK(t *testing.T, to target) {
	s := newGoSDK(to)
	t.Run("reply", s.reply)
	t.Run("stream", s.stream)
	t.Run("unknown fields", s.unknownFields)
	t.Run("usage", s.usage)
	t.Run("tools", s.tools)
	t.Run("vision", s.vision)
	t.Run("structured", s.structured)
	t.Run("reasoning", s.reasoning)
	t.Run("choices and logprobs", s.choices)
	t.Run("raw response", s.rawResponse)
	t.Run("models", s.models)
	t.Run("cancel", s.cancel)
	t.Run("failures", s.failures)
	for _, c := range to.Cases {
		calls := []string{c.Call}
		if c.Call == "" {
			calls = []string{"chat", "stream"}
		}
		for _, call := range calls {
			t.Run("case "+c.Name+" "+call, func(t *testing.T) { s.oneCase(t, c, call) })
		}
	}
	if to.RealModel != "" {
		t.Run("real model", s.realModel)
	}
}

func (s goSDK) params() chatParams {
	return chatParams{Model: s.Model, Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Say hello to the SDK.")}}
}

// steer asks the demo model for a speed or a fault.
func steer(demo map[string]any) option.RequestOption { return option.WithJSONSet("demo", demo) }

func (s goSDK) mustReply(t *testing.T, p chatParams, opts ...option.RequestOption) *openai.ChatCompletion {
	t.Helper()
	reply, err := s.Chat.Completions.New(t.Context(), p, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return reply
}

// read collects a stream to its end or error.
func (s goSDK) read(ctx context.Context, p chatParams, opts ...option.RequestOption) ([]chatChunk, error) {
	stream := s.Chat.Completions.NewStreaming(ctx, p, opts...)
	defer stream.Close()
	var chunks []chatChunk
	for stream.Next() {
		chunks = append(chunks, stream.Current())
	}
	return chunks, stream.Err()
}

// mustStream collects a stream and checks what every whole stream keeps: one identity,
// the role first, nothing of a choice after its finish_reason.
func (s goSDK) mustStream(t *testing.T, p chatParams, opts ...option.RequestOption) ([]chatChunk, *openai.ChatCompletion) {
	t.Helper()
	chunks, err := s.read(t.Context(), p, opts...)
	if err != nil {
		t.Fatal(err)
	}
	if len(chunks) == 0 {
		t.Fatal("the stream is empty")
	}
	var whole openai.ChatCompletionAccumulator
	started, finished := map[int64]bool{}, map[int64]bool{}
	for i, c := range chunks {
		if first := chunks[0]; c.ID != first.ID || c.Created != first.Created || c.Model != p.Model || c.Object != "chat.completion.chunk" {
			t.Errorf("chunk %d changes identity: %s", i, c.RawJSON())
		}
		for _, choice := range c.Choices {
			if !started[choice.Index] && choice.Delta.Role != "assistant" {
				t.Errorf("choice %d doesn't begin with its role: %s", choice.Index, c.RawJSON())
			}
			if finished[choice.Index] {
				t.Errorf("choice %d goes on after its finish_reason: %s", choice.Index, c.RawJSON())
			}
			started[choice.Index] = true
			if choice.FinishReason != "" {
				finished[choice.Index] = true
				if choice.Delta.Content != "" || len(choice.Delta.ToolCalls) > 0 {
					t.Errorf("content rides with the finish_reason: %s", c.RawJSON())
				}
			}
		}
		if !whole.AddChunk(c) {
			t.Errorf("the SDK's accumulator refuses chunk %d: %s", i, c.RawJSON())
		}
	}
	if want := max(1, int(p.N.Or(1))); len(finished) != want {
		t.Errorf("%d choices finished, want %d", len(finished), want)
	}
	return chunks, &whole.ChatCompletion
}

func (s goSDK) reply(t *testing.T) {
	reply := s.mustReply(t, s.params())
	if reply.Object != "chat.completion" || reply.Model != s.Model || len(reply.Choices) != 1 {
		t.Fatalf("reply is %s", reply.RawJSON())
	}
	choice := reply.Choices[0]
	if choice.Message.Role != "assistant" || choice.Message.Content == "" || choice.FinishReason != "stop" {
		t.Errorf("choice is %s", choice.RawJSON())
	}
	if u := reply.Usage; u.PromptTokens <= 0 || u.CompletionTokens <= 0 || u.TotalTokens != u.PromptTokens+u.CompletionTokens {
		t.Errorf("usage is %s", u.RawJSON())
	}
	if age := time.Since(time.Unix(reply.Created, 0)); age.Abs() > time.Minute {
		t.Errorf("created %v ago", age)
	}

	limited := s.params()
	limited.MaxCompletionTokens = openai.Int(2)
	if r := s.mustReply(t, limited); r.Choices[0].FinishReason != "length" || r.Usage.CompletionTokens != 2 {
		t.Errorf("reply of 2 tokens is %s", r.RawJSON())
	}
}

func (s goSDK) stream(t *testing.T) {
	for name, opts := range map[string][]option.RequestOption{
		"short": nil,
		"long":  {steer(map[string]any{"tokens": 256, "numbered": true})},
	} {
		t.Run(name, func(t *testing.T) {
			reply := s.mustReply(t, s.params(), opts...).Choices[0]
			_, whole := s.mustStream(t, s.params(), opts...)
			if name == "long" && !strings.HasSuffix(reply.Message.Content, " 254 255") {
				t.Errorf("reply of 256 numbers is %q", reply.Message.Content)
			}
			if got := whole.Choices[0]; got.Message.Content != reply.Message.Content || got.FinishReason != reply.FinishReason {
				t.Errorf("stream says %q (%s), the reply %q (%s)", got.Message.Content, got.FinishReason, reply.Message.Content, reply.FinishReason)
			}
		})
	}
}

// unknownFields: what the edge doesn't understand reaches the backend as it was sent.
func (s goSDK) unknownFields(t *testing.T) {
	p := s.params()
	p.Seed = openai.Int(7)
	reply := s.mustReply(t, p, option.WithJSONSet("chat_template_kwargs", map[string]any{"enable_thinking": false}), steer(map[string]any{"echo": true}))
	var body struct {
		Seed   int
		Kwargs json.RawMessage `json:"chat_template_kwargs"`
	}
	text := reply.Choices[0].Message.Content
	if err := json.Unmarshal([]byte(text), &body); err != nil || body.Seed != 7 || string(body.Kwargs) != `{"enable_thinking":false}` {
		t.Errorf("the backend got %s: %v", text, err)
	}
}

func (s goSDK) usage(t *testing.T) {
	chunks, _ := s.mustStream(t, s.params())
	for _, c := range chunks {
		if c.JSON.Usage.Valid() {
			t.Errorf("usage that nobody asked for: %s", c.RawJSON())
		}
	}
	p := s.params()
	p.StreamOptions.IncludeUsage = openai.Bool(true)
	chunks, whole := s.mustStream(t, p)
	last := chunks[len(chunks)-1]
	if len(last.Choices) != 0 || !last.JSON.Usage.Valid() {
		t.Errorf("last chunk is %s", last.RawJSON())
	}
	for _, c := range chunks[:len(chunks)-1] {
		if c.JSON.Usage.Raw() != "null" {
			t.Errorf("usage isn't null: %s", c.RawJSON())
		}
	}
	if want := s.mustReply(t, s.params()).Usage; whole.Usage.TotalTokens != want.TotalTokens {
		t.Errorf("stream used %d tokens, the reply %d", whole.Usage.TotalTokens, want.TotalTokens)
	}
}

func (s goSDK) tools(t *testing.T) {
	p := s.params()
	p.Tools = []openai.ChatCompletionToolUnionParam{openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{
		Name:        "get_weather",
		Description: openai.String("The weather of a city."),
		Parameters: shared.FunctionParameters{
			"type": "object", "properties": map[string]any{"city": map[string]any{"type": "string"}}, "required": []string{"city"},
		},
	})}
	p.ToolChoice = openai.ChatCompletionToolChoiceOptionUnionParam{OfAuto: openai.String("required")}

	reply := s.mustReply(t, p).Choices[0]
	if reply.FinishReason != "tool_calls" || len(reply.Message.ToolCalls) == 0 {
		t.Fatalf("reply is %s", reply.RawJSON())
	}
	call := reply.Message.ToolCalls[0]
	var arguments map[string]any
	if err := json.Unmarshal([]byte(call.Function.Arguments), &arguments); err != nil || call.ID == "" || call.Function.Name != "get_weather" {
		t.Errorf("call is %s: %v", call.RawJSON(), err)
	}

	_, whole := s.mustStream(t, p)
	streamed := whole.Choices[0]
	if streamed.FinishReason != "tool_calls" || len(streamed.Message.ToolCalls) != len(reply.Message.ToolCalls) {
		t.Fatalf("streamed calls: %+v, in the reply: %s", streamed.Message.ToolCalls, reply.RawJSON())
	}
	for i, c := range streamed.Message.ToolCalls {
		if want := reply.Message.ToolCalls[i].Function; c.ID == "" || c.Function.Name != want.Name || c.Function.Arguments != want.Arguments {
			t.Errorf("streamed call %d is %+v, in the reply %+v", i, c, want)
		}
	}
	_, whole = s.mustStream(t, p, steer(map[string]any{"tool_calls": 3}))
	if n := len(whole.Choices[0].Message.ToolCalls); n != 3 {
		t.Errorf("%d tool calls, want 3", n)
	}

	// The answer of the tool goes back, and the model goes on in words.
	p.Messages = append(p.Messages, reply.Message.ToParam(), openai.ToolMessage("sunny", call.ID))
	p.ToolChoice.OfAuto = openai.String("none")
	if after := s.mustReply(t, p).Choices[0]; after.Message.Content == "" {
		t.Errorf("after the tool: %s", after.RawJSON())
	}
}

func (s goSDK) vision(t *testing.T) {
	p := s.params()
	p.Messages = []openai.ChatCompletionMessageParamUnion{openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{
		openai.TextContentPart("What is this?"),
		openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: pixel}),
	})}
	if reply := s.mustReply(t, p); reply.Choices[0].Message.Content == "" {
		t.Errorf("reply is %s", reply.RawJSON())
	}
}

func (s goSDK) structured(t *testing.T) {
	p := s.params()
	p.ResponseFormat.OfJSONObject = &shared.ResponseFormatJSONObjectParam{}
	var object map[string]any
	if text := s.mustReply(t, p).Choices[0].Message.Content; json.Unmarshal([]byte(text), &object) != nil {
		t.Errorf("json_object gave %q", text)
	}

	p = s.params()
	p.ResponseFormat.OfJSONSchema = &shared.ResponseFormatJSONSchemaParam{JSONSchema: shared.ResponseFormatJSONSchemaJSONSchemaParam{
		Name: "city", Strict: openai.Bool(true), Schema: map[string]any{
			"type": "object", "additionalProperties": false, "required": []string{"name", "population"},
			"properties": map[string]any{"name": map[string]any{"type": "string"}, "population": map[string]any{"type": "integer"}},
		},
	}}
	_, whole := s.mustStream(t, p)
	for _, text := range []string{s.mustReply(t, p).Choices[0].Message.Content, whole.Choices[0].Message.Content} {
		var city struct {
			Name       *string
			Population *int
		}
		if err := json.Unmarshal([]byte(text), &city); err != nil || city.Name == nil || city.Population == nil {
			t.Errorf("json_schema gave %q: %v", text, err)
		}
	}
}

func (s goSDK) reasoning(t *testing.T) {
	opt := steer(map[string]any{"reasoning_tokens": 5})
	message := s.mustReply(t, s.params(), opt).Choices[0].Message
	var want string
	if err := json.Unmarshal([]byte(message.JSON.ExtraFields["reasoning_content"].Raw()), &want); err != nil || want == "" {
		t.Fatalf("reply is %s: %v", message.RawJSON(), err)
	}
	var got strings.Builder
	chunks, whole := s.mustStream(t, s.params(), opt)
	for _, c := range chunks {
		if field, ok := c.Choices[0].Delta.JSON.ExtraFields["reasoning_content"]; ok {
			var part string
			if err := json.Unmarshal([]byte(field.Raw()), &part); err != nil {
				t.Fatal(err)
			}
			got.WriteString(part)
		}
	}
	if got.String() != want || whole.Choices[0].Message.Content != message.Content {
		t.Errorf("stream reasons %q and says %q, the reply %q and %q", got.String(), whole.Choices[0].Message.Content, want, message.Content)
	}
}

func (s goSDK) choices(t *testing.T) {
	p := s.params()
	p.N = openai.Int(3)
	if n := len(s.mustReply(t, p).Choices); n != 3 {
		t.Errorf("%d choices, want 3", n)
	}
	s.mustStream(t, p)

	p = s.params()
	p.Logprobs, p.TopLogprobs = openai.Bool(true), openai.Int(2)
	want := s.mustReply(t, p).Choices[0].Logprobs.Content
	_, whole := s.mustStream(t, p)
	got := whole.Choices[0].Logprobs.Content
	if len(want) == 0 || len(want[0].TopLogprobs) != 2 {
		t.Errorf("logprobs are %+v", want)
	}
	same := func(a, b openai.ChatCompletionTokenLogprob) bool { return a.Token == b.Token && a.Logprob == b.Logprob }
	if !slices.EqualFunc(got, want, same) {
		t.Errorf("streamed logprobs are %+v, in the reply %+v", got, want)
	}
}

func (s goSDK) rawResponse(t *testing.T) {
	var res *http.Response
	s.mustReply(t, s.params(), option.WithResponseInto(&res))
	if res.Header.Get("x-request-id") == "" || !strings.HasPrefix(res.Header.Get("Content-Type"), "application/json") {
		t.Errorf("headers are %v", res.Header)
	}
	s.mustStream(t, s.params(), option.WithResponseInto(&res))
	if res.Header.Get("x-request-id") == "" || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/event-stream") {
		t.Errorf("headers of the stream are %v", res.Header)
	}
}

func (s goSDK) models(t *testing.T) {
	seen := map[string]string{}
	pager := s.Client.Models.ListAutoPaging(t.Context())
	for pager.Next() {
		m := pager.Current()
		one, err := s.Client.Models.Get(t.Context(), m.ID)
		if err != nil {
			t.Errorf("model %s: %v", m.ID, err)
		} else if one.RawJSON() != m.RawJSON() {
			t.Errorf("model %s is %s, in the list %s", m.ID, one.RawJSON(), m.RawJSON())
		}
		seen[m.ID] = m.JSON.ExtraFields["capabilities"].Raw()
	}
	if err := pager.Err(); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{s.Model, s.TextModel, s.SlashModel} {
		if seen[id] == "" {
			t.Errorf("model %q isn't listed with capabilities", id)
		}
	}
	p := s.params()
	p.Model = s.SlashModel
	if !strings.Contains(p.Model, "/") || !strings.Contains(p.Model, ":") {
		t.Errorf("%q has no slash and colon", p.Model)
	}
	if got := s.mustReply(t, p).Model; got != p.Model {
		t.Errorf("model of the reply is %q, want %q", got, p.Model)
	}
	s.mustStream(t, p)
}

// aborted is how many requests the demo backend saw abandoned.
func (s goSDK) aborted(t *testing.T) int64 {
	t.Helper()
	res, err := http.Get(s.BackendURL + "/demo/stats")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var stats struct{ Aborted int64 }
	if err := json.NewDecoder(res.Body).Decode(&stats); err != nil {
		t.Fatal(err)
	}
	return stats.Aborted
}

func (s goSDK) cancel(t *testing.T) {
	slow := steer(map[string]any{"tokens": 1000, "tokens_per_second": 20})
	leave := map[string]func(t *testing.T){
		"stream": func(t *testing.T) {
			stream := s.Chat.Completions.NewStreaming(t.Context(), s.params(), slow)
			if !stream.Next() {
				t.Fatal(stream.Err())
			}
			stream.Close()
		},
		"reply": func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second) // in which it gets there
			defer cancel()
			if _, err := s.Chat.Completions.New(ctx, s.params(), slow); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("got %v", err)
			}
		},
	}
	for name, leave := range leave {
		t.Run(name, func(t *testing.T) {
			before := s.aborted(t)
			leave(t)
			deadline := time.Now().Add(3500 * time.Millisecond) // two of them for busy cores
			for s.aborted(t) == before {
				if time.Now().After(deadline) {
					t.Fatal("the backend still works 3.5 s after the client left")
				}
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
}

// realModel: a real model behind a real llama.cpp server (scripts/realmodel).
func (s goSDK) realModel(t *testing.T) {
	p := chatParams{
		Model:       s.RealModel,
		Messages:    []openai.ChatCompletionMessageParamUnion{openai.UserMessage("What is the capital of France? Answer in one short sentence.")},
		Temperature: param.NewOpt(0.0), // greedy, so that a reply and its stream are the same text
		MaxTokens:   openai.Int(24),
	}
	// llama.cpp's own field: it takes effect only if the body arrives untouched.
	uncached := option.WithJSONSet("cache_prompt", false)

	reply := s.mustReply(t, p, uncached)
	text := reply.Choices[0].Message.Content
	if !strings.Contains(text, "Paris") || reply.Model != s.RealModel {
		t.Errorf("reply is %s", reply.RawJSON())
	}
	streamed := p
	streamed.StreamOptions.IncludeUsage = openai.Bool(true)
	chunks, whole := s.mustStream(t, streamed, uncached)
	if whole.Choices[0].Message.Content != text || len(chunks) < 5 {
		t.Errorf("%d chunks say %q, the reply %q", len(chunks), whole.Choices[0].Message.Content, text)
	}
	if a, b := whole.Usage, reply.Usage; a.PromptTokens != b.PromptTokens || a.CompletionTokens != b.CompletionTokens || b.PromptTokens < 10 {
		t.Errorf("stream used %s, the reply %s", a.RawJSON(), b.RawJSON())
	}
	if n := s.mustReply(t, p, uncached).Usage.PromptTokensDetails.CachedTokens; n != 0 {
		t.Errorf("%d tokens came from the cache that the request forbids", n)
	}

	second := p
	second.Messages = append(slices.Clone(p.Messages), openai.AssistantMessage(text), openai.UserMessage("And of Italy?"))
	if got := s.mustReply(t, second, uncached); got.Choices[0].Message.Content == "" || got.Usage.PromptTokens <= reply.Usage.TotalTokens {
		t.Errorf("second turn is %s", got.RawJSON())
	}

	long := p
	long.Messages = []openai.ChatCompletionMessageParamUnion{openai.UserMessage(strings.Repeat("hello world ", 6000))}
	_, err := s.Chat.Completions.New(t.Context(), long)
	_, streamErr := s.read(t.Context(), long)
	for _, err := range []error{err, streamErr} {
		if e := apiError(t, err); e.StatusCode != 400 || e.Code != "context_length_exceeded" {
			t.Errorf("error is %d %s", e.StatusCode, e.RawJSON())
		}
	}
}
