package schemas

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
)

// FrameKind says what a frame carries.
type FrameKind string

const (
	// FrameClaim opens a run: the worker asks the owner, by request, whether it may
	// run the job. Like FrameProgress it has the number of the last frame sent, so 0 at
	// first, and is repeated until it is answered.
	FrameClaim FrameKind = "claim"
	// FrameChunk carries one or more lines, each an OpenAI chunk as JSON; of a reply
	// that isn't streamed, a piece of its body.
	FrameChunk FrameKind = "chunk"
	// FrameProgress is sent by request once a second. It carries nothing, and the
	// number of the last frame sent: so a worker learns that its owner is gone, and
	// which frames got lost on the way.
	FrameProgress FrameKind = "progress"
	// FrameDone ends a reply, by request: the last lines or the last piece of the
	// body, and the usage.
	FrameDone FrameKind = "done"
	// FrameError ends a reply with an error, by request.
	FrameError FrameKind = "error"
)

// Terminal reports whether the frame ends a reply.
func (k FrameKind) Terminal() bool { return k == FrameDone || k == FrameError }

// Usage is what a reply burnt, in tokens.
type Usage struct {
	PromptTokens     int `json:"prompt_tokens"`
	CompletionTokens int `json:"completion_tokens"`
}

// Frame is one message from a worker to the owner of a request. On the wire it is
// one line of JSON, the head, followed by Payload.
//
// Chunk, done and error frames are numbered from 1 within a run. The owner takes a
// frame only if its run is the one whose claim was granted and its number follows
// the last, so a frame is neither lost nor repeated in silence.
type Frame struct {
	// Run names one delivery of a job to one worker. Of two runs of the same attempt,
	// only the one that claimed first counts.
	Run  string    `json:"run"`
	Seq  uint64    `json:"seq"`
	Kind FrameKind `json:"kind"`
	// Tokens counts the output tokens of the reply so far, as far as the worker knows,
	// those included that the job says were there before.
	Tokens int `json:"tokens,omitempty"`
	// PromptTokens is the exact size of the prompt, where the backend can tell it before
	// it runs; on a progress frame.
	PromptTokens int `json:"prompt_tokens,omitempty"`
	// Loading says, on a claim or progress frame, that the model isn't in memory yet:
	// the deadline of the first token doesn't run while it loads.
	Loading bool   `json:"loading,omitempty"`
	Usage   *Usage `json:"usage,omitempty"`
	Error   *Error `json:"error,omitempty"`
	Payload []byte `json:"-"`
}

// AppendFrame appends the wire form of the frame. The head of a chunk frame, of
// which there are as many as tokens, is written by hand.
func AppendFrame(dst []byte, f *Frame) ([]byte, error) {
	if f.Kind == FrameChunk && f.Usage == nil && f.Error == nil && !f.Loading && f.PromptTokens == 0 && plainToken(f.Run) {
		dst = append(dst, chunkHead...)
		dst = append(dst, f.Run...)
		dst = append(dst, chunkSeq...)
		dst = strconv.AppendUint(dst, f.Seq, 10)
		dst = append(dst, chunkTokens...)
		dst = strconv.AppendInt(dst, int64(f.Tokens), 10)
		dst = append(dst, '}')
	} else {
		other := *f // allocated here, and not by whoever sends a chunk
		head, err := json.Marshal(&other)
		if err != nil {
			return nil, fmt.Errorf("encode frame: %w", err)
		}
		dst = append(dst, head...)
	}
	dst = append(dst, '\n')
	return append(dst, f.Payload...), nil
}

const (
	chunkHead   = `{"kind":"chunk","run":"`
	chunkSeq    = `","seq":`
	chunkTokens = `,"tokens":`
)

// DecodeFrame reads the wire form of a frame. Payload is a part of b.
func DecodeFrame(b []byte) (Frame, error) {
	head, payload, ok := bytes.Cut(b, []byte{'\n'})
	if !ok {
		return Frame{}, errors.New("frame has no head")
	}
	f, ok := decodeChunkHead(head)
	if !ok {
		// A variable of its own, since it is allocated, and a chunk needn't pay for that.
		var other Frame
		if err := json.Unmarshal(head, &other); err != nil {
			return Frame{}, fmt.Errorf("frame head: %w", err)
		}
		f = other
	}
	f.Payload = payload
	switch {
	case f.Run == "":
		return Frame{}, errors.New("frame has no run")
	case f.Tokens < 0, f.PromptTokens < 0, f.Usage != nil && (f.Usage.PromptTokens < 0 || f.Usage.CompletionTokens < 0):
		return Frame{}, errors.New("frame has a negative count of tokens")
	case f.Kind == FrameClaim, f.Kind == FrameProgress, f.Kind == FrameChunk, f.Kind == FrameDone:
		return f, nil
	case f.Kind == FrameError && f.Error != nil:
		return f, nil
	case f.Kind == FrameError:
		return Frame{}, errors.New("error frame has no error")
	}
	return Frame{}, fmt.Errorf("frame has unknown kind %q", f.Kind)
}

// decodeChunkHead reads the head that AppendFrame writes by hand; anything else,
// however valid, it leaves to encoding/json.
func decodeChunkHead(head []byte) (f Frame, ok bool) {
	rest, ok := bytes.CutPrefix(head, []byte(chunkHead))
	if !ok {
		return f, false
	}
	end := bytes.IndexByte(rest, '"')
	if end < 0 || !plainToken(rest[:end]) {
		return f, false
	}
	f.Kind, f.Run = FrameChunk, string(rest[:end])
	if rest, ok = bytes.CutPrefix(rest[end:], []byte(chunkSeq)); !ok {
		return f, false
	}
	if f.Seq, rest, ok = cutUint(rest); !ok {
		return f, false
	}
	if rest, ok = bytes.CutPrefix(rest, []byte(chunkTokens)); !ok {
		return f, false
	}
	tokens, rest, ok := cutUint(rest)
	f.Tokens = int(tokens)
	return f, ok && len(rest) == 1 && rest[0] == '}'
}

func cutUint(b []byte) (n uint64, rest []byte, ok bool) {
	i := 0
	for i < len(b) && b[i] >= '0' && b[i] <= '9' {
		n = n*10 + uint64(b[i]-'0')
		i++
	}
	// More than 18 digits could overflow, and a leading zero isn't JSON.
	return n, b[i:], i > 0 && i <= 18 && (b[0] != '0' || i == 1)
}

// Verdict is the owner's answer to a frame that came as a request.
type Verdict struct {
	// Go says to go on; otherwise the run has to stop, and Reason says why.
	Go     bool   `json:"go"`
	Reason string `json:"reason,omitempty"`
	// Seq is the number that the frame had, and Next the number that the owner expects
	// next. When Next isn't above Seq, something got lost on the way, and the worker
	// sends again from Next.
	Seq  uint64 `json:"seq"`
	Next uint64 `json:"next,omitempty"`
	// Limit and More are those of the job, as they are now. Without a limit, nothing has
	// changed.
	Limit int64 `json:"limit,omitempty"`
	More  bool  `json:"more,omitempty"`
}

// Encode returns the wire form of the verdict.
func (v Verdict) Encode() []byte { return mustMarshal(v) }

// The reasons of a Verdict that stops a run.
const (
	ReasonCancelled  = "cancelled"  // the client went away, or a deadline passed
	ReasonSuperseded = "superseded" // another run or attempt has the request
	ReasonFinished   = "finished"   // the owner knows nothing of the attempt (any more)
)
