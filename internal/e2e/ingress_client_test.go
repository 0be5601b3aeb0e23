package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// publisher is a client over NATS, as anybody would write one.
type publisher struct {
	nc  *nats.Conn
	key schemas.KeyID
	// header is sent along with every chat request.
	header nats.Header
}

// patient is how long a test waits for the bus to let it in, which takes a broker that is awake.
const patient = 20 * time.Second

// connect connects to the bus, though on a busy machine it may take more than one try of two
// seconds. A longer try would be one that hangs for longer, too, when the connection is lost.
func connect(t *testing.T, url string, options ...nats.Option) *nats.Conn {
	t.Helper()
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		nc, err := nats.Connect(url, options...)
		switch {
		case err == nil:
			return nc
		case time.Since(began) > patient:
			t.Fatal(err)
		}
	}
}

// newPublisher connects with a secret of the key, and waits until the brokers answer.
func newPublisher(t *testing.T, url string, key schemas.KeyID, secret string, options ...nats.Option) *publisher {
	t.Helper()
	options = append(options, nats.Token(secret), nats.CustomInboxPrefix(schemas.PublisherInboxPrefix(key)), nats.MaxReconnects(-1))
	nc := connect(t, url, options...)
	t.Cleanup(nc.Close)
	p := &publisher{nc: nc, key: key}
	stack.Until(t, 30*time.Second, "a broker that answers publishers", func() bool {
		_, err := nc.Request(schemas.InSubject(key, schemas.OperationWhoami), nil, time.Second)
		return err == nil
	})
	return p
}

// awaitModel waits until the brokers know a model, whichever of two or so is asked.
func (p *publisher) awaitModel(t *testing.T) {
	t.Helper()
	stack.Until(t, 30*time.Second, "brokers that know a model", func() bool {
		for range 20 {
			var list schemas.ModelsAnswer
			if p.ask(schemas.OperationModels, nil, &list) != nil || len(list.Data) == 0 {
				return false
			}
		}
		return true
	})
}

// heard is what a publisher has heard of a request.
type heard struct {
	request    schemas.RequestID
	messages   int
	progress   int
	text       string
	usage      *schemas.TotalUsage
	completion json.RawMessage
	err        *schemas.ClientError
	retryAfter int
	broken     error
}

func (h heard) code() schemas.Code {
	if h.err == nil {
		return ""
	}
	return h.err.Code
}

// take takes in one message of a reply, and reports whether it was the last.
func (h *heard) take(data []byte) bool {
	a, err := schemas.DecodeAnswer(data)
	switch {
	case err != nil:
		h.broken = err
		return true
	case a.Seq != uint64(h.messages+1) || h.request != "" && a.Request != h.request:
		h.broken = fmt.Errorf("message %s after %d of %s", data, h.messages, h.request)
		return true
	}
	h.messages, h.request = h.messages+1, a.Request
	switch a.Kind {
	case schemas.FrameProgress:
		h.progress++
	case schemas.FrameChunk:
		var chunk chatChunk
		if err := json.Unmarshal(a.Chunk, &chunk); err != nil {
			h.broken = err
			return true
		}
		for _, choice := range chunk.Choices {
			h.text += choice.Delta.Content
		}
	case schemas.FrameDone:
		h.usage, h.completion = a.Usage, a.Completion
		return true
	case schemas.FrameError:
		h.err, h.retryAfter = a.Error, a.RetryAfter
		return true
	}
	return false
}

// chat sends a chat request, and reads the reply to its end.
func (p *publisher) chat(ctx context.Context, stream bool, fields map[string]any) heard {
	return p.follow(ctx, schemas.OperationChat, chatBody(stream, fields), func(*heard, *nats.Msg) {})
}

// follow is chat with any operation and body, and calls seen with what there is of the reply
// after each message.
func (p *publisher) follow(ctx context.Context, operation string, body []byte, seen func(*heard, *nats.Msg)) (h heard) {
	inbox := p.nc.NewInbox()
	sub, err := p.nc.SubscribeSync(inbox)
	if err != nil {
		return heard{broken: err}
	}
	defer sub.Unsubscribe()
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return heard{broken: err}
	}
	m := &nats.Msg{Subject: schemas.InSubject(p.key, operation), Reply: inbox, Header: p.header, Data: body}
	if err := p.nc.PublishMsg(m); err != nil {
		return heard{broken: err}
	}
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			h.broken = err
			return h
		}
		if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
			h.broken = nats.ErrNoResponders
			return h
		}
		last := h.take(m.Data)
		if seen(&h, m); last {
			return h
		}
	}
}

// ask asks for something that is answered by one message, into answer, or by an error.
func (p *publisher) ask(operation string, body []byte, answer any) *schemas.ClientError {
	m, err := p.nc.Request(schemas.InSubject(p.key, operation), body, 10*time.Second)
	if err != nil {
		return &schemas.ClientError{Message: err.Error()}
	}
	if a, err := schemas.DecodeAnswer(m.Data); err == nil {
		return a.Error
	}
	d := json.NewDecoder(bytes.NewReader(m.Data))
	d.DisallowUnknownFields()
	if err := d.Decode(answer); err != nil {
		return &schemas.ClientError{Message: err.Error()}
	}
	return nil
}

// wantDone fails the test unless the reply is complete.
func wantDone(t *testing.T, h heard) {
	t.Helper()
	if h.broken != nil || h.err != nil || h.usage == nil || h.progress == 0 {
		t.Errorf("reply isn't whole: error %+v, broken %v, usage %+v, %d messages, %d of them progress, text %.60q",
			h.err, h.broken, h.usage, h.messages, h.progress, h.text)
	}
}

// errLeft is why a test's publisher has left.
var errLeft = errors.New("the publisher has left")
