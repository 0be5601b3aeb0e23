package demo

import (
	"strconv"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// appendHead appends what every chunk begins with.
func (r *run) appendHead(dst []byte, object string) []byte {
	dst = append(dst, `{"id":"chatcmpl-demo-`...)
	dst = strconv.AppendInt(dst, completions.Add(1), 10)
	dst = append(dst, `","object":"`...)
	dst = append(dst, object...)
	dst = append(dst, `","created":`...)
	dst = strconv.AppendInt(dst, time.Now().Unix(), 10)
	dst = append(dst, `,"model":`...)
	dst = schemas.AppendString(dst, r.q.model)
	return append(dst, `,"choices":[`...)
}

func (r *run) reasoningField() string {
	if r.f.ReasoningField != "" {
		return r.f.ReasoningField
	}
	return "reasoning_content"
}

// appendInner appends s as the inside of a JSON string. Most tokens need no escape.
func appendInner(dst []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			var scratch [64]byte
			quoted := schemas.AppendString(scratch[:0], s)
			return append(dst, quoted[1:len(quoted)-1]...)
		}
	}
	return append(dst, s...)
}

// appendTokens appends the tokens of a text as the inside of a JSON string.
func (r *run) appendTokens(dst []byte, from, to, choice int) []byte {
	for i := from; i < to; i++ {
		if i == r.f.LoseAt {
			continue
		}
		dst = appendInner(dst, r.p.token(i, choice))
		if i == r.f.RepeatAt {
			dst = appendInner(dst, r.p.token(i, choice))
		}
	}
	return dst
}

func appendCall(dst []byte, id, name, arguments string) []byte {
	dst = append(dst, `"id":"`...)
	dst = append(dst, id...)
	dst = append(dst, `","type":"function","function":{"name":`...)
	dst = schemas.AppendString(dst, name)
	dst = append(dst, `,"arguments":`...)
	dst = schemas.AppendString(dst, arguments)
	return append(dst, '}')
}

// appendLogprobs appends made-up log probabilities of the tokens.
func (r *run) appendLogprobs(dst []byte, pos, next, choice int) []byte {
	dst = append(dst, `{"content":[`...)
	for i := pos; i < next; i++ {
		if i > pos {
			dst = append(dst, ',')
		}
		token := r.p.token(i, choice)
		dst = appendLogprob(dst, token, 0)
		dst = append(dst, `,"top_logprobs":[`...)
		for rank := range r.q.topLogprobs {
			if rank > 0 {
				dst = append(dst, ',')
				token = filler[(i+rank)%len(filler)]
			}
			dst = append(appendLogprob(dst, token, rank), '}')
		}
		dst = append(dst, `]}`...)
	}
	return append(dst, `],"refusal":null}`...)
}

// appendLogprob appends an object that isn't closed yet.
func appendLogprob(dst []byte, token string, rank int) []byte {
	dst = append(dst, `{"token":`...)
	dst = schemas.AppendString(dst, token)
	dst = append(dst, `,"logprob":-`...)
	dst = strconv.AppendFloat(dst, 0.25+float64(rank), 'f', -1, 64)
	dst = append(dst, `,"bytes":[`...)
	for i := range len(token) {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = strconv.AppendInt(dst, int64(token[i]), 10)
	}
	return append(dst, ']')
}

// appendUsage appends the usage of n choices of so many tokens.
func (r *run) appendUsage(dst []byte, tokens, n int) []byte {
	thought := min(max(r.p.reasoning-r.p.start, 0), tokens) * n
	tokens *= n
	dst = append(dst, `{"prompt_tokens":`...)
	dst = strconv.AppendInt(dst, int64(r.q.tokens), 10)
	dst = append(dst, `,"completion_tokens":`...)
	dst = strconv.AppendInt(dst, int64(tokens), 10)
	dst = append(dst, `,"total_tokens":`...)
	dst = strconv.AppendInt(dst, int64(r.q.tokens+tokens), 10)
	dst = append(dst, `,"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":`...)
	dst = strconv.AppendInt(dst, int64(thought), 10)
	return append(dst, `}}`...)
}
