package chat

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ownllm/ownllm/schemas"
)

// with returns a valid request with more members.
func with(members string) string {
	return `{"model":"m","messages":[{"role":"user","content":"hi"}],` + members + `}`
}

// withMessage returns a valid request with one message.
func withMessage(message string) string { return `{"model":"m","messages":[` + message + `]}` }

// withContent returns a valid request whose message has the content.
func withContent(content string) string {
	return withMessage(`{"role":"user","content":` + content + `}`)
}

func TestParse(t *testing.T) {
	base := Request{Model: "m", N: 1, Messages: 1, TextBytes: 2}
	but := func(change func(*Request)) Request {
		r := base
		change(&r)
		return r
	}
	tests := []struct {
		name, body string
		want       Request
	}{
		{"least", withContent(`"hi"`), base},
		{"white space", " \r\n\t{ \"model\" :\"m\"\n,\"messages\": [ { \"role\" : \"user\" , \"content\" : \"hi\" } ] } \n", base},
		{"stream", with(`"stream":true`), but(func(r *Request) { r.Stream = true })},
		{"usage", with(`"stream_options":{"include_usage":true},"stream":true`), but(func(r *Request) { r.Stream, r.IncludeUsage = true, true })},
		{"no usage", with(`"stream":true,"stream_options":{}`), but(func(r *Request) { r.Stream = true })},
		{"max_tokens", with(`"max_tokens":17`), but(func(r *Request) { r.MaxTokens = 17 })},
		{"max_tokens 10.0", with(`"max_tokens":10.0`), but(func(r *Request) { r.MaxTokens = 10 })},
		{"max_tokens 1e3", with(`"max_tokens":1e3`), but(func(r *Request) { r.MaxTokens = 1000 })},
		{"max_completion_tokens", with(`"max_completion_tokens":18`), but(func(r *Request) { r.MaxTokens = 18 })},
		{"both limits", with(`"max_completion_tokens":18,"max_tokens":18`), but(func(r *Request) { r.MaxTokens = 18 })},
		{"largest limit", with(`"max_tokens":2147483647`), but(func(r *Request) { r.MaxTokens = MaxTokensLimit })},
		{"n", with(`"n":128`), but(func(r *Request) { r.N = 128 })},
		{"tools", with(`"tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"auto","parallel_tool_calls":false`), but(func(r *Request) { r.HasTools = true })},
		{"tool_choice object", with(`"tool_choice":{"type":"function","function":{"name":"f"}}`), base},
		{"functions", with(`"functions":[{"name":"f"}]`), but(func(r *Request) { r.HasTools = true })},
		{"no tools", with(`"tools":[],"functions":[ ]`), base},
		{"format text", with(`"response_format":{"type":"text"}`), but(func(r *Request) { r.ResponseFormat = "text" })},
		{"format schema", with(`"response_format":{"type":"json_schema","json_schema":{"name":"x"}}`), but(func(r *Request) { r.ResponseFormat = "json_schema" })},
		{"logprobs", with(`"logprobs":true,"top_logprobs":20`), but(func(r *Request) { r.Logprobs = true })},
		{"stop", with(`"stop":"x"`), base},
		{"stops", with(`"stop":["a","b","c","d"]`), base},
		{"no stops", with(`"stop":[]`), base},
		{"bounds", with(`"temperature":2,"top_p":0,"presence_penalty":-2.0,"frequency_penalty":2e0,"seed":-9223372036854775808,"user":"u"`), base},
		{"seed as JavaScript rounds it", with(`"seed":9223372036854776000`), base},
		{"underflow is zero", with(`"temperature":1e-400`), base},
		{"nulls", with(`"stream":null,"stream_options":null,"n":null,"max_tokens":null,"max_completion_tokens":null,"temperature":null,` +
			`"top_p":null,"presence_penalty":null,"frequency_penalty":null,"logprobs":null,"top_logprobs":null,"stop":null,"seed":null,` +
			`"tools":null,"functions":null,"tool_choice":null,"parallel_tool_calls":null,"response_format":null,"user":null`), base},
		{"null include_usage", with(`"stream":true,"stream_options":{"include_usage":null}`), but(func(r *Request) { r.Stream = true })},
		{"unknown fields", with(`"chat_template_kwargs":{"a":[1,{"model":"z"}]},"reasoning_effort":"low","x":1,"x":2,"":3`), base},
		{"escaped key", `{"mod\u0065l":"m","messages":[{"r\u006fle":"user","content":"hi"}]}`, base},
		{"escaped model", `{"model":"\u006d","messages":[{"role":"\u0075ser","content":"hi"}]}`, base},
		{"model of many scripts", `{"model":"qwen/qwen2.5:32b-é","messages":[{"role":"user","content":"hi"}]}`, but(func(r *Request) { r.Model = "qwen/qwen2.5:32b-é" })},
		{"longest model", `{"model":"` + strings.Repeat("m", 256) + `","messages":[{"role":"user","content":"hi"}]}`, but(func(r *Request) { r.Model = strings.Repeat("m", 256) })},
		{"every role", `{"model":"m","messages":[{"role":"system","content":""},{"role":"developer","content":""},{"role":"user","content":[]},` +
			`{"role":"assistant","content":null},{"role":"assistant"},{"role":"tool","content":"a"},{"role":"function","content":null}]}`,
			but(func(r *Request) { r.Messages, r.TextBytes = 7, 1 })},
		{"text of escapes", withContent(`"a\n\u00e9\ud83d\ude00\"é"`), but(func(r *Request) { r.TextBytes = 1 + 1 + 2 + 4 + 1 + 2 })},
		{"name counts", withMessage(`{"role":"user","name":"bob","content":"hi"}`), but(func(r *Request) { r.TextBytes = 7 })},
		{"tool calls count", withMessage(`{"role":"assistant","tool_calls":[{"id":1}]}`), but(func(r *Request) { r.TextBytes = 10 })},
		{"parts", withContent(`[{"type":"text","text":"h"},{"type":"text","text":"i"},{"type":"input_audio","input_audio":{"data":"xxxx"}},{"type":"novel"}]`), base},
		{"image", withContent(`[{"type":"text","text":"hi"},{"type":"image_url","image_url":{"url":"data:image/png;base64,xxxx"}}]`), but(func(r *Request) { r.Images = 1 })},
		{"image as a string", withContent(`[{"type":"text","text":"hi"},{"type":"image_url","image_url":"http://x"}]`), but(func(r *Request) { r.Images = 1 })},
		{"image by another name", withContent(`[{"type":"text","text":"hi"},{"type":"input_image","image":"x"}]`), but(func(r *Request) { r.Images = 1 })},
		{"image under a false type", withContent(`[{"type":"text","text":"hi","image_url":"http://x"}]`), but(func(r *Request) { r.Images = 1 })},
		{"escaped image", withContent(`[{"type":"text","text":"hi"},{"type":"im\u0061ge_url","image_url":{"url":"x"}}]`), but(func(r *Request) { r.Images = 1 })},
		{"deepest", with(`"x":` + strings.Repeat("[", 499) + strings.Repeat("]", 499)), base},
		{"surrogate pair", with(`"x":"\uD83D\uDE00\\ud83d"`), base},
		{"brackets in strings", with(`"x":"[[[{{{\"]}\\","y":"\\\\"`), base},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := Parse(test.body)
			if err != nil {
				t.Fatalf("Parse(%s): %v", test.body, err)
			}
			test.want.Body, test.want.ToolBytes = test.body, got.ToolBytes // see TestPromptBound
			if diff := cmp.Diff(test.want, *got, cmpopts.IgnoreUnexported(Request{})); diff != "" {
				t.Errorf("Parse(%s): -want +got\n%s", test.body, diff)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	const (
		badJSON  = schemas.CodeInvalidJSON
		badValue = schemas.CodeInvalidValue
	)
	tests := []struct {
		name, body string
		code       schemas.Code
		param      string
		says       string // a part of the message
	}{
		{"empty", ``, badJSON, "", "empty"},
		{"blank", " \n", badJSON, "", "empty"},
		{"array", `[]`, badJSON, "", "an array, not a JSON object"},
		{"string", ` "{}"`, badJSON, "", "a string, not a JSON object"},
		{"null", `null`, badJSON, "", "null, not a JSON object"},
		{"number", `12`, badJSON, "", "a number, not a JSON object"},
		{"cut", `{"model":"m"`, badJSON, "", "unexpected end"},
		{"trailing", `{"model":"m"} x`, badJSON, "", "byte 15"},
		{"two objects", `{}{}`, badJSON, "", "byte 3"},
		{"single quotes", `{'model':'m'}`, badJSON, "", "isn't valid JSON"},
		{"trailing comma", `{"model":"m",}`, badJSON, "", "isn't valid JSON"},
		{"NaN", with(`"temperature":NaN`), badJSON, "", "isn't valid JSON"},
		{"leading zero", with(`"n":01`), badJSON, "", "isn't valid JSON"},
		{"newline in string", withContent("\"a\nb\""), badJSON, "", "isn't valid JSON"},
		{"byte order mark", "\ufeff{}", badJSON, "", "isn't valid JSON"},
		{"invalid UTF-8", withContent("\"\xff\""), badJSON, "", "isn't valid UTF-8 (byte 51)"},
		{"encoded surrogate", withContent("\"\xed\xa0\x80\""), badJSON, "", "isn't valid UTF-8"},
		{"high surrogate", withContent(`"\ud83d"`), badJSON, "", `\ud83d at byte 51`},
		{"high surrogate and no low one", withContent(`"\ud83d\u0041"`), badJSON, "", `\ud83d`},
		{"low surrogate", withContent(`"\uDE00"`), badJSON, "", `\uDE00`},
		{"surrogate in a key", with(`"\ud83d":1`), badJSON, "", `\ud83d`},
		{"too deep", with(`"x":` + strings.Repeat("[", 500) + strings.Repeat("]", 500)), badJSON, "", "500 deep"},

		{"no model", `{"messages":[{"role":"user","content":"hi"}]}`, schemas.CodeModelRequired, "model", "GET /v1/models"},
		{"nothing", `{}`, schemas.CodeModelRequired, "model", ""},
		{"null model", `{"model":null,"messages":[]}`, schemas.CodeModelRequired, "model", ""},
		{"empty model", `{"model":"","messages":[]}`, schemas.CodeModelRequired, "model", ""},
		{"no messages", `{"model":"m"}`, schemas.CodeMessagesRequired, "messages", ""},
		{"null messages", `{"model":"m","messages":null}`, schemas.CodeMessagesRequired, "messages", ""},
		{"empty messages", `{"model":"m","messages":[ ]}`, schemas.CodeMessagesRequired, "messages", ""},
		{"required before values", `{"temperature":"hot","model":"m"}`, schemas.CodeMessagesRequired, "messages", ""},
		{"required before a wrong model", `{"model":7}`, schemas.CodeMessagesRequired, "messages", ""},

		{"model number", `{"model":7,"messages":[{}]}`, badValue, "model", "must be a string, not a number"},
		{"model too long", `{"model":"` + strings.Repeat("m", 257) + `","messages":[{}]}`, badValue, "model", "256 bytes"},
		{"model with a newline", `{"model":"a\nb","messages":[{}]}`, badValue, "model", "control"},
		{"model with NUL", `{"model":"a\u0000","messages":[{}]}`, badValue, "model", "control"},
		{"model with DEL", "{\"model\":\"a\x7f\",\"messages\":[{}]}", badValue, "model", "control"},
		{"model with C1", `{"model":"a\u0085","messages":[{}]}`, badValue, "model", "control"},

		{"model twice", with(`"model":"z"`), badValue, "model", "twice"},
		{"model twice, once escaped", with(`"mod\u0065l":"z"`), badValue, "model", "twice"},
		{"null and model", with(`"model":null`), badValue, "model", "twice"},
		{"messages twice", with(`"messages":[]`), badValue, "messages", "twice"},
		{"stream twice", with(`"stream":true,"stream":false`), badValue, "stream", "twice"},
		{"twice inside stream_options", with(`"stream":true,"stream_options":{"include_usage":true,"include_usage":false}`), badValue, "stream_options.include_usage", "twice"},
		{"role twice", withMessage(`{"role":"user","content":"","role":"system"}`), badValue, "messages[0].role", "twice"},
		{"content twice", withMessage(`{"role":"user","content":"","content":[{"type":"image_url"}]}`), badValue, "messages[0].content", "twice"},
		{"part type twice", withContent(`[{"type":"text","text":"","type":"image_url"}]`), badValue, "messages[0].content[0].type", "twice"},
		{"format type twice", with(`"response_format":{"type":"text","type":"x"}`), badValue, "response_format.type", "twice"},
		{"Model", with(`"Model":"z"`), badValue, "model", `"Model": did you mean "model"?`},
		{"only Model", `{"Model":"m","messages":[{"role":"user","content":"hi"}]}`, badValue, "model", "did you mean"},
		{"escaped Model", with(`"\u004dodel":"z"`), badValue, "model", "did you mean"},
		{"long s", with("\"me\u017f\u017fages\":[]"), badValue, "messages", "did you mean"},
		{"Kelvin sign", with("\"max_to\u212aens\":1"), badValue, "max_tokens", "did you mean"},
		{"Kelvin sign, escaped", with(`"max_to\u212aens":1`), badValue, "max_tokens", "did you mean"},
		{"Role", withMessage(`{"Role":"user","role":"user","content":""}`), badValue, "messages[0].role", "did you mean"},
		{"Include_Usage", with(`"stream":true,"stream_options":{"Include_Usage":true}`), badValue, "stream_options.include_usage", "did you mean"},

		{"messages object", `{"model":"m","messages":{}}`, badValue, "messages", "must be an array, not an object"},
		{"message string", withMessage(`"hi"`), badValue, "messages[0]", "must be an object, not a string"},
		{"second message", withMessage(`{"role":"user","content":"a"},7`), badValue, "messages[1]", "not a number"},
		{"no role", withMessage(`{"content":"a"}`), badValue, "messages[0].role", "missing"},
		{"null role", withMessage(`{"role":null,"content":"a"}`), badValue, "messages[0].role", "not null"},
		{"unknown role", withMessage(`{"role":"bot","content":"a"}`), badValue, "messages[0].role", `"bot"`},
		{"user without content", withMessage(`{"role":"user"}`), badValue, "messages[0].content", "missing"},
		{"null content", withContent(`null`), badValue, "messages[0].content", "not null"},
		{"content number", withContent(`5`), badValue, "messages[0].content", "not a number"},
		{"content object", withContent(`{"type":"text","text":"a"}`), badValue, "messages[0].content", "not an object"},
		{"part string", withContent(`["a"]`), badValue, "messages[0].content[0]", "not a string"},
		{"part without type", withContent(`[{"text":"a"}]`), badValue, "messages[0].content[0].type", "missing"},
		{"part type", `{"model":"m","messages":[{"role":"system","content":"a"},{"role":"user","content":"b"},{"role":"user","content":[{"type":1}]}]}`, badValue, "messages[2].content[0].type", "must be a string, not a number"},
		{"text part without text", withContent(`[{"type":"text"}]`), badValue, "messages[0].content[0].text", "missing"},
		{"text part with a number", withContent(`[{"type":"text","text":1}]`), badValue, "messages[0].content[0].text", "not a number"},
		{"image without url", withContent(`[{"type":"text","text":""},{"type":"image_url"}]`), badValue, "messages[0].content[1].image_url", "missing"},
		{"image number", withContent(`[{"type":"image_url","image_url":3}]`), badValue, "messages[0].content[0].image_url", "not a number"},
		{"tool_calls", withMessage(`{"role":"assistant","tool_calls":{}}`), badValue, "messages[0].tool_calls", "not an object"},

		{"stream string", with(`"stream":"true"`), badValue, "stream", "must be a boolean, not a string"},
		{"stream number", with(`"stream":1`), badValue, "stream", "boolean"},
		{"options without stream", with(`"stream_options":{"include_usage":true}`), badValue, "stream_options", "only allowed when stream is true"},
		{"options array", with(`"stream":true,"stream_options":[]`), badValue, "stream_options", "object"},
		{"include_usage string", with(`"stream":true,"stream_options":{"include_usage":"yes"}`), badValue, "stream_options.include_usage", "boolean"},
		{"n 0", with(`"n":0`), badValue, "n", "from 1 to 128, not 0"},
		{"n 129", with(`"n":129`), badValue, "n", "from 1 to 128"},
		{"n 1.5", with(`"n":1.5`), badValue, "n", "integer"},
		{"n string", with(`"n":"1"`), badValue, "n", "not a string"},
		{"max_tokens 0", with(`"max_tokens":0`), badValue, "max_tokens", "from 1 to 2147483647"},
		{"max_tokens -1", with(`"max_tokens":-1`), badValue, "max_tokens", "not -1"},
		{"max_tokens over int32", with(`"max_tokens":2147483648`), badValue, "max_tokens", "2147483647"},
		{"max_tokens over int64", with(`"max_tokens":18446744073709551617`), badValue, "max_tokens", ""},
		{"max_tokens huge", with(`"max_tokens":1e999`), badValue, "max_tokens", "1e999"},
		{"max_tokens of many digits", with(`"max_tokens":` + strings.Repeat("9", 100000)), badValue, "max_tokens", "…"},
		{"max_tokens fraction", with(`"max_tokens":1.5`), badValue, "max_tokens", "an integer"},
		{"limits differ", with(`"max_tokens":1,"max_completion_tokens":2`), badValue, "max_completion_tokens", "differ"},
		{"temperature", with(`"temperature":2.1`), badValue, "temperature", "from 0 to 2, not 2.1"},
		{"temperature string", with(`"temperature":"1"`), badValue, "temperature", "not a string"},
		{"temperature huge", with(`"temperature":1e400`), badValue, "temperature", ""},
		{"top_p", with(`"top_p":-0.1`), badValue, "top_p", ""},
		{"presence_penalty", with(`"presence_penalty":3`), badValue, "presence_penalty", ""},
		{"frequency_penalty", with(`"frequency_penalty":-3`), badValue, "frequency_penalty", ""},
		{"logprobs", with(`"logprobs":5`), badValue, "logprobs", ""},
		{"top_logprobs", with(`"top_logprobs":21`), badValue, "top_logprobs", ""},
		{"stop number", with(`"stop":1`), badValue, "stop", ""},
		{"stop of numbers", with(`"stop":["a",1]`), badValue, "stop[1]", ""},
		{"five stops", with(`"stop":["a","b","c","d","e"]`), badValue, "stop", "at most 4"},
		{"seed string", with(`"seed":"1"`), badValue, "seed", ""},
		{"seed fraction", with(`"seed":0.5`), badValue, "seed", ""},
		{"seed huge", with(`"seed":1e30`), badValue, "seed", ""},
		{"tools object", with(`"tools":{}`), badValue, "tools", ""},
		{"tool string", with(`"tools":["f"]`), badValue, "tools[0]", ""},
		{"tool without type", with(`"tools":[{"type":"function"},{}]`), badValue, "tools[1].type", "missing"},
		{"tool type", with(`"tools":[{"type":1}]`), badValue, "tools[0].type", ""},
		{"functions", with(`"functions":[1]`), badValue, "functions[0]", ""},
		{"tool_choice", with(`"tool_choice":1`), badValue, "tool_choice", ""},
		{"parallel_tool_calls", with(`"parallel_tool_calls":"no"`), badValue, "parallel_tool_calls", ""},
		{"response_format", with(`"response_format":"json"`), badValue, "response_format", ""},
		{"user", with(`"user":1`), badValue, "user", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r, err := Parse(test.body)
			checkError(t, err, test.code, test.param, test.says)
			if r != nil {
				t.Errorf("Parse returned %+v beside an error", r)
			}
		})
	}
}

func checkError(t *testing.T, err error, code schemas.Code, param, says string) {
	t.Helper()
	var e *schemas.Error
	if !errors.As(err, &e) {
		t.Fatalf("error is %v, want a *schemas.Error with code %s", err, code)
	}
	if e.Code != code || e.Param != param || !strings.Contains(e.Message, says) {
		t.Errorf("error is %s with param %q and message %q, want %s with param %q and %q in the message", e.Code, e.Param, e.Message, code, param, says)
	}
	if len(e.Message) > 400 {
		t.Errorf("the message has %d bytes: it repeats too much of the request", len(e.Message))
	}
	if !strings.HasSuffix(e.Message, ".") {
		t.Errorf("message %q isn't a sentence", e.Message)
	}
}

// The stack must not grow with the body: a stack overflow can't be recovered from.
func TestParseHostile(t *testing.T) {
	const size = 32 << 20
	bodies := map[string]string{
		"arrays":            strings.Repeat("[", size),
		"objects":           strings.Repeat(`{"a":`, size/5),
		"arrays in a value": `{"a":` + strings.Repeat("[", size),
		"backslashes":       `{"a":"` + strings.Repeat(`\\`, size/2) + `"}`,
		"quotes":            `{"a":"` + strings.Repeat(`\"`, size/2) + `"}`,
		"open string":       `{"a":"` + strings.Repeat(`\"`, size/2),
		"keys":              `{` + strings.Repeat(`"Z":1,`, size/6) + `"a":1}`,
		"closing":           strings.Repeat("]", size),
		"digits":            `{"n":` + strings.Repeat("9", size) + `}`,
	}
	for name, body := range bodies {
		t.Run(name, func(t *testing.T) {
			if _, err := Parse(body); err == nil {
				t.Error("Parse accepted it")
			}
		})
	}
}

func TestCheckModel(t *testing.T) {
	able := schemas.Model{ID: "m", ContextWindow: 100, Capabilities: schemas.Capabilities{Completion: true, Tools: true, Vision: true}}
	plain := schemas.Model{ID: "m", ContextWindow: 100}
	unknown := able
	unknown.ContextWindow = 0
	const (
		tools  = `"tools":[{"type":"function"}]`
		image  = `[{"type":"image_url","image_url":{"url":"x"}}]`
		format = `"response_format":{"type":"xml"}`
	)
	long := strings.Repeat("x", 512*100)
	tests := []struct {
		name  string
		body  string
		model schemas.Model
		code  schemas.Code // empty: accepted
		param string
		says  string
	}{
		{"plain", withContent(`"hi"`), plain, "", "", ""},
		{"able", `{"model":"m","messages":[{"role":"user","content":` + image + `}],` + tools + `}`, able, "", "", ""},
		{"tools", with(tools), plain, schemas.CodeModelDoesNotSupportTools, "tools", `"m" can't call tools`},
		{"functions", with(`"functions":[{}]`), plain, schemas.CodeModelDoesNotSupportTools, "tools", ""},
		{"vision", withContent(image), plain, schemas.CodeModelDoesNotSupportVision, "messages", `"m" can't see`},
		{"tools before vision", `{"model":"m","messages":[{"role":"user","content":` + image + `}],` + tools + `}`, plain, schemas.CodeModelDoesNotSupportTools, "tools", ""},
		{"vision before format", `{"model":"m","messages":[{"role":"user","content":` + image + `}],` + format + `}`, plain, schemas.CodeModelDoesNotSupportVision, "messages", ""},
		{"format before length", with(format + `,"max_tokens":101`), plain, schemas.CodeInvalidResponseFormat, "response_format.type", `is "xml"`},
		{"format text", with(`"response_format":{"type":"text"}`), plain, "", "", ""},
		{"format json_object", with(`"response_format":{"type":"json_object"}`), plain, "", "", ""},
		{"format json_schema", with(`"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{}}}`), plain, "", "", ""},
		{"format without schema", with(`"response_format":{"type":"json_schema"}`), plain, schemas.CodeInvalidResponseFormat, "response_format.json_schema", "isn't an object"},
		{"format with a string schema", with(`"response_format":{"type":"json_schema","json_schema":"x"}`), plain, schemas.CodeInvalidResponseFormat, "response_format.json_schema", ""},
		{"format without type", with(`"response_format":{}`), plain, schemas.CodeInvalidResponseFormat, "response_format.type", "missing"},
		{"format number", with(`"response_format":{"type":5}`), plain, schemas.CodeInvalidResponseFormat, "response_format.type", "is 5"},
		{"format empty", with(`"response_format":{"type":""}`), plain, schemas.CodeInvalidResponseFormat, "response_format.type", ""},
		{"limit at the window", with(`"max_tokens":100`), plain, "", "", ""},
		{"limit above the window", with(`"max_tokens":101`), plain, schemas.CodeContextLengthExceeded, "max_tokens", "up to 101 tokens"},
		{"limit, window unknown", with(`"max_tokens":2000000000`), unknown, "", "", ""},
		{"messages", withMessage(strings.Repeat(`{"role":"user","content":""},`, 100) + `{"role":"user","content":""}`), plain, schemas.CodeContextLengthExceeded, "messages", "101 messages"},
		{"text", withContent(`"` + long + `"`), plain, schemas.CodeContextLengthExceeded, "messages", "51200 bytes"},
		{"text in parts", withContent(`[{"type":"text","text":"` + long[:40000] + `"},{"type":"text","text":"` + long[:11200] + `"}]`), plain, schemas.CodeContextLengthExceeded, "messages", "51200 bytes"},
		{"text, window unknown", withContent(`"` + long + `"`), unknown, "", "", ""},
		{"text just below", withContent(`"` + long[1:] + `"`), plain, "", "", ""},
		{"white space is trimmed", withContent(`"` + strings.Repeat(" ", 512*100) + `\n"`), plain, "", "", ""},
		{"assistant text may be dropped", withMessage(`{"role":"assistant","content":"` + long + `"}`), plain, "", "", ""},
		{"images aren't text", withContent(`[{"type":"image_url","image_url":{"url":"` + long + `"}}]`), able, "", "", ""},
		{"names aren't certain", withMessage(`{"role":"user","name":"` + long + `","content":""}`), plain, "", "", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r, err := Parse(test.body)
			if err != nil {
				t.Fatalf("Parse: %v", err)
			}
			err = r.CheckModel(test.model)
			if test.code == "" {
				if err != nil {
					t.Fatalf("CheckModel: %v", err)
				}
				return
			}
			checkError(t, err, test.code, test.param, test.says)
		})
	}
}

func TestModelDoesNotHoldTheBody(t *testing.T) {
	body := withContent(`"hi"`)
	r, err := Parse(body)
	if err != nil {
		t.Fatal(err)
	}
	at := strings.Index(body, `"m"`) + 1
	if same := body[at : at+1]; &[]byte(r.Model)[0] == &[]byte(same)[0] {
		t.Error("the model shares memory with the body")
	}
}

func benchmarkBody(size int) string {
	var b strings.Builder
	b.WriteString(`{"model":"llama-3.3-70b","temperature":0.7,"stream":true,"stream_options":{"include_usage":true},"max_tokens":256,"messages":[{"role":"system","content":"You are a helpful assistant.\nBe brief."}`)
	for i := 0; b.Len() < size; i++ {
		fmt.Fprintf(&b, `,{"role":"%s","content":"Message %d: %s\n\n%s"}`, []string{"user", "assistant"}[i%2], i,
			strings.Repeat("The quick brown fox jumps over the lazy dog. ", 5), strings.Repeat("Größe \\\"x\\\" ", 3))
	}
	b.WriteString(`]}`)
	return b.String()
}

func BenchmarkParse(b *testing.B) {
	image := withContent(`[{"type":"text","text":"What is it?"},{"type":"image_url","image_url":{"url":"data:image/png;base64,` + strings.Repeat("iVBORw0K", 128<<10) + `"}}]`)
	for _, bench := range []struct{ name, body string }{
		{"200B", benchmarkBody(200)},
		{"2KB", benchmarkBody(2 << 10)},
		{"1MB", benchmarkBody(1 << 20)},
		{"1MBImage", image},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(bench.body)))
			for b.Loop() {
				if _, err := Parse(bench.body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestContinuable(t *testing.T) {
	for members, want := range map[string]bool{
		`"stream":true`: true,
		`"stream":true,"n":1,"logprobs":false,"response_format":{"type":"text"},"grammar":null,"stop":"x"`: true,
		`"stream":true,"tools":[{"type":"function","function":{"name":"f"}}]`:                              true, // until it calls one
		`"stream":true,"echo":true`: true,
		`"stream":false`:            false,
		`"n":1`:                     false,
		`"stream":true,"n":2`:       false,
		`"stream":true,"logprobs":true,"top_logprobs":2`:                                                false,
		`"stream":true,"response_format":{"type":"json_object"}`:                                        false,
		`"stream":true,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{}}}`: false,
		`"stream":true,"grammar":"root ::= \"a\""`:                                                      false,
		`"stream":true,"json_schema":{}`:                                                                false,
		`"stream":true,"format":"json"`:                                                                 false,
		`"stream":true,"guided_json":{}`:                                                                false,
		`"stream":true,"guided_regex":"a*"`:                                                             false,
		`"stream":true,"guided_choice":["a"]`:                                                           false,
		`"stream":true,"guided_grammar":"x"`:                                                            false,
		`"stream":true,"structured_outputs":{"json":{}}`:                                                false,
	} {
		r, err := Parse(with(members))
		if err != nil {
			t.Fatalf("%s: %v", members, err)
		}
		if got := r.Continuable(); got != want {
			t.Errorf("%s: continuable is %v", members, got)
		}
	}
	for last, want := range map[string]bool{`{"role":"user","content":"a"}`: true, `{"role":"tool","content":"a"}`: true, `{"role":"\u0061ssistant","content":"a"}`: false} {
		r, err := Parse(`{"model":"m","stream":true,"messages":[{"role":"assistant","content":"hi"},` + last + `]}`)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Continuable(); got != want {
			t.Errorf("after %s: continuable is %v", last, got)
		}
	}
}
