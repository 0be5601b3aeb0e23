package demo

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/shared"
)

// The official SDK, unmodified, against the demo model.
func TestOpenAISDK(t *testing.T) {
	_, url := server(t, Options{Key: "secret"})
	client := openai.NewClient(option.WithBaseURL(url+"/v1"), option.WithAPIKey("secret"), option.WithMaxRetries(0))
	params := openai.ChatCompletionNewParams{
		Model:    ModelID,
		Messages: []openai.ChatCompletionMessageParamUnion{openai.SystemMessage("Be brief."), openai.UserMessage("hi")},
	}
	fault := func(name string, value any) option.RequestOption { return option.WithJSONSet("demo."+name, value) }

	t.Run("whole", func(t *testing.T) {
		reply, err := client.Chat.Completions.New(t.Context(), params, fault("numbered", true), fault("tokens", 5))
		if err != nil {
			t.Fatal(err)
		}
		if got := reply.Choices[0].Message.Content; got != count(5) || reply.Usage.CompletionTokens != 5 || reply.Usage.PromptTokens != 9 {
			t.Errorf("%q, usage %+v", got, reply.Usage)
		}
	})
	t.Run("stream", func(t *testing.T) {
		params := params
		params.StreamOptions = openai.ChatCompletionStreamOptionsParam{IncludeUsage: openai.Bool(true)}
		stream := client.Chat.Completions.NewStreaming(t.Context(), params, fault("numbered", true), fault("tokens", 50))
		defer stream.Close()
		var whole openai.ChatCompletionAccumulator
		for stream.Next() {
			if !whole.AddChunk(stream.Current()) {
				t.Fatal("the accumulator refused a chunk")
			}
		}
		if err := stream.Err(); err != nil {
			t.Fatal(err)
		}
		if c := whole.Choices[0]; c.Message.Content != count(50) || c.FinishReason != "stop" || c.Message.Role != "assistant" || whole.Usage.CompletionTokens != 50 {
			t.Errorf("%+v", whole.ChatCompletion)
		}
	})
	t.Run("tools", func(t *testing.T) {
		params := params
		params.Tools = []openai.ChatCompletionToolUnionParam{openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{
			Name: "weather",
			Parameters: shared.FunctionParameters{
				"type": "object", "properties": map[string]any{"city": map[string]any{"type": "string"}}, "required": []string{"city"},
			},
		})}
		params.ToolChoice = openai.ChatCompletionToolChoiceOptionUnionParam{OfAuto: openai.String("required")}
		stream := client.Chat.Completions.NewStreaming(t.Context(), params)
		defer stream.Close()
		var whole openai.ChatCompletionAccumulator
		for stream.Next() {
			whole.AddChunk(stream.Current())
		}
		if err := stream.Err(); err != nil {
			t.Fatal(err)
		}
		calls := whole.Choices[0].Message.ToolCalls
		if len(calls) != 1 || calls[0].Function.Name != "weather" || calls[0].Function.Arguments != `{"city": "demo"}` || whole.Choices[0].FinishReason != "tool_calls" {
			t.Errorf("%+v", whole.ChatCompletion)
		}
	})
	t.Run("structured output", func(t *testing.T) {
		params := params
		params.ResponseFormat = openai.ChatCompletionNewParamsResponseFormatUnion{OfJSONSchema: &shared.ResponseFormatJSONSchemaParam{
			JSONSchema: shared.ResponseFormatJSONSchemaJSONSchemaParam{Name: "x", Schema: map[string]any{
				"type": "object", "properties": map[string]any{"n": map[string]any{"type": "integer", "minimum": 3}}, "required": []string{"n"}}},
		}}
		reply, err := client.Chat.Completions.New(t.Context(), params)
		if err != nil {
			t.Fatal(err)
		}
		var v struct{ N int }
		if err := json.Unmarshal([]byte(reply.Choices[0].Message.Content), &v); err != nil || v.N != 3 {
			t.Errorf("%q: %v", reply.Choices[0].Message.Content, err)
		}
	})
	t.Run("error", func(t *testing.T) {
		_, err := client.Chat.Completions.New(t.Context(), params, fault("status", 503))
		var e *openai.Error
		if !errors.As(err, &e) || e.StatusCode != 503 || e.Message == "" {
			t.Errorf("%v", err)
		}
	})
	t.Run("error in the stream", func(t *testing.T) {
		stream := client.Chat.Completions.NewStreaming(t.Context(), params, fault("error_after", 3))
		defer stream.Close()
		for stream.Next() {
		}
		if stream.Err() == nil {
			t.Error("the stream ended without an error")
		}
	})
	t.Run("models", func(t *testing.T) {
		page, err := client.Models.List(t.Context())
		if err != nil || len(page.Data) != 1 || page.Data[0].ID != ModelID || page.Data[0].OwnedBy != "ownllm-demo" {
			t.Errorf("%+v, %v", page, err)
		}
	})
}
