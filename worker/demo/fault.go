package demo

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Faults are what can be asked of the demo model: the shape of a reply, its pace, and
// the ways to fail. Set them for all models or one with PUT /demo/faults, or for a
// single request with an object "demo" in its body.
//
// The …_after faults count tokens from the start of the whole reply, reasoning
// included, of each choice if there are several; -1 is never, 0 before the first. A
// reply that continues a text has left behind what lies before its start: so a
// request that says die_after 100 dies once, and a failover continues from there. Of
// several, the first in the reply counts. In a reply that isn't streamed they come
// before the first byte.
type Faults struct {
	// Tokens is how many tokens the reply has; 0 leaves it to what there is to say. A
	// Text, an Echo and a JSON reply have the length that they have.
	Tokens int `json:"tokens"`
	// FirstTokenMS is the time to the first token, and to the status line.
	FirstTokenMS int `json:"first_token_ms"`
	// TokensPerSecond is the pace after the first token; 0 is as fast as possible.
	TokensPerSecond float64 `json:"tokens_per_second"`
	// Jitter moves each token by up to this share of the time between two, 0 to 1. The
	// pace on the whole stays.
	Jitter float64 `json:"jitter"`
	// TokensPerChunk is how many tokens come in one chunk; 0 is 1.
	TokensPerChunk int `json:"tokens_per_chunk"`
	// Numbered makes the tokens " 0", " 1", " 2" and so on, 64 if Tokens doesn't say
	// otherwise, so that a checker sees each exactly once. Of choice c > 0 they are
	// " c:0", " c:1".
	Numbered bool `json:"numbered"`
	// Text is the reply.
	Text string `json:"text"`
	// Echo makes the request's body, as it arrived, the reply.
	Echo bool `json:"echo"`
	// SplitUTF8 cuts each event into two TCP writes, in the middle of a character where
	// there is one longer than a byte; 1 ms apart.
	SplitUTF8 bool `json:"split_utf8"`
	// ReasoningTokens come before the reply, as delta.reasoning_content or as
	// ReasoningField says.
	ReasoningTokens int    `json:"reasoning_tokens"`
	ReasoningField  string `json:"reasoning_field"`
	// ToolCalls is how many tools are called instead of a text, their arguments in
	// pieces of one token. A tool_choice that forces a call makes one anyway.
	ToolCalls int `json:"tool_calls"`
	// NoUsage leaves the usage out.
	NoUsage bool `json:"no_usage"`
	// PromptTokens is how many tokens the prompt counts as; 0 is as many as it has.
	PromptTokens int `json:"prompt_tokens"`
	// IgnoreLimit makes a reply as long as it is, whatever max_tokens says.
	IgnoreLimit bool `json:"ignore_limit"`

	// Status answers with this HTTP status and an error instead of a reply, with
	// Retry-After if RetryAfter, in seconds, is above 0, and with ErrorBody as the body
	// if that isn't empty.
	Status     int    `json:"status"`
	RetryAfter int    `json:"retry_after"`
	ErrorBody  string `json:"error_body"`
	// DieAfter closes the connection abruptly.
	DieAfter int `json:"die_after"`
	// ErrorAfter sends an event {"error":{…}} and [DONE], as vLLM does; status 500 if
	// not streamed.
	ErrorAfter int `json:"error_after"`
	// EndAfter ends the stream cleanly, with no finish_reason, usage or [DONE].
	EndAfter int `json:"end_after"`
	// StallAfter sends nothing more, and keeps the connection open.
	StallAfter int `json:"stall_after"`
	// GarbageAfter sends something that isn't JSON and ends.
	GarbageAfter int `json:"garbage_after"`
	// LoseAt leaves this token out of the text, and RepeatAt has it twice, without a word;
	// the first is 0, -1 is none. Usage counts as if nothing were wrong.
	LoseAt   int `json:"lose_at"`
	RepeatAt int `json:"repeat_at"`
	// LoadMS is how long a cold model takes to load: its first request, and those that
	// come meanwhile, wait that long. Set by PUT /demo/faults, it makes models cold.
	LoadMS int `json:"load_ms"`
	// Times, set by PUT /demo/faults, ends all this after so many requests; 0 is never.
	Times int `json:"times"`
}

// Help says in plain text how to ask for speeds and faults.
const Help = `The model "demo" says what it is asked to, at the pace and with the faults it is
asked for. Set them for all requests:

    curl -X PUT localhost:PORT/demo/faults -d '{"tokens":256,"tokens_per_second":50}'

or for one, with an object "demo" in the body of a chat completion:

    {"model":"demo","messages":[…],"demo":{"numbered":true,"die_after":100}}

  tokens             length of the reply; 0: as long as what there is to say
  first_token_ms     time to the first token
  tokens_per_second  pace; 0: as fast as possible
  jitter             share of the time between two tokens by which each moves, 0 to 1
  tokens_per_chunk   tokens in one chunk
  numbered           tokens are " 0", " 1", " 2" …
  text               the reply
  echo               the reply is the request's body
  split_utf8         events cut in the middle of a character
  reasoning_tokens   tokens of reasoning before the reply
  reasoning_field    the field they come in: reasoning_content
  tool_calls         number of tool calls instead of a text
  no_usage           leave the usage out
  prompt_tokens      the prompt counts as so many tokens
  ignore_limit       don't heed max_tokens
  status             answer with this HTTP status; retry_after, error_body go with it
  die_after          after n tokens: close the connection
  error_after        after n tokens: an error in the stream
  end_after          after n tokens: end without finish_reason and [DONE]
  stall_after        after n tokens: send nothing more
  garbage_after      after n tokens: something that isn't JSON
  lose_at            leave token n out
  repeat_at          send token n twice
  load_ms            a cold model loads this long
  times              only for so many requests (PUT only)

GET /demo/stats shows what it did, POST /demo/reset makes it forget, POST
/demo/unload makes its models cold.
`

// NoFaults returns the Faults that change nothing.
func NoFaults() Faults {
	return Faults{DieAfter: -1, ErrorAfter: -1, EndAfter: -1, StallAfter: -1, GarbageAfter: -1, LoseAt: -1, RepeatAt: -1}
}

const (
	maxTokens  = 10_000_000
	maxCalls   = 128
	maxSeconds = 3600
)

// ParseFaults reads Faults from a JSON object, as PUT /demo/faults takes it.
func ParseFaults(object []byte) (Faults, error) {
	f := NoFaults()
	err := f.overlay(object)
	return f, err
}

// overlay sets the fields that a JSON object names. It refuses what it doesn't know:
// a fault that is misspelt would make a test pass that tests nothing.
func (f *Faults) overlay(object []byte) error {
	decoder := json.NewDecoder(bytes.NewReader(object))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(f); err != nil {
		return fmt.Errorf("demo faults: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return errors.New("demo faults: more than one JSON value")
	}
	return f.Validate()
}

// Validate returns an error for what is out of range.
func (f *Faults) Validate() error {
	for _, c := range []struct {
		name      string
		value     int
		low, high int
	}{
		{"tokens", f.Tokens, 0, maxTokens},
		{"first_token_ms", f.FirstTokenMS, 0, maxSeconds * 1000},
		{"tokens_per_chunk", f.TokensPerChunk, 0, maxTokens},
		{"reasoning_tokens", f.ReasoningTokens, 0, maxTokens},
		{"tool_calls", f.ToolCalls, 0, maxCalls},
		{"prompt_tokens", f.PromptTokens, 0, maxTokens},
		{"retry_after", f.RetryAfter, 0, maxSeconds},
		{"die_after", f.DieAfter, -1, maxTokens},
		{"error_after", f.ErrorAfter, -1, maxTokens},
		{"end_after", f.EndAfter, -1, maxTokens},
		{"stall_after", f.StallAfter, -1, maxTokens},
		{"garbage_after", f.GarbageAfter, -1, maxTokens},
		{"lose_at", f.LoseAt, -1, maxTokens},
		{"repeat_at", f.RepeatAt, -1, maxTokens},
		{"load_ms", f.LoadMS, 0, maxSeconds * 1000},
		{"times", f.Times, 0, maxTokens},
	} {
		if c.value < c.low || c.value > c.high {
			return fmt.Errorf("demo faults: %s must be from %d to %d, not %d", c.name, c.low, c.high, c.value)
		}
	}
	if f.Status != 0 && (f.Status < 400 || f.Status > 599) {
		return fmt.Errorf("demo faults: status must be from 400 to 599, not %d", f.Status)
	}
	if f.TokensPerSecond != 0 && !(f.TokensPerSecond >= 0.001 && f.TokensPerSecond <= 1e6) {
		return fmt.Errorf("demo faults: tokens_per_second must be 0, or from 0.001 to 1000000, not %v", f.TokensPerSecond)
	}
	if !(f.Jitter >= 0 && f.Jitter <= 1) {
		return fmt.Errorf("demo faults: jitter must be from 0 to 1, not %v", f.Jitter)
	}
	return nil
}

// failure is a way to fail in the middle of a reply.
type failure int

const (
	failNone failure = iota
	failDie
	failError
	failEnd
	failStall
	failGarbage
)

// failure returns the first failure of a reply that begins at the position start, and
// the position of it.
func (f *Faults) failure(start int) (what failure, at int) {
	for _, c := range [...]struct {
		what failure
		at   int
	}{{failDie, f.DieAfter}, {failError, f.ErrorAfter}, {failEnd, f.EndAfter}, {failStall, f.StallAfter}, {failGarbage, f.GarbageAfter}} {
		// What lies at the very start of a continued text has happened already.
		if c.at < start || c.at == start && start > 0 {
			continue
		}
		if what == failNone || c.at < at {
			what, at = c.what, c.at
		}
	}
	return what, at
}
