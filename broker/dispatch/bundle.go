package dispatch

import (
	"bytes"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/schemas"
)

// bundle takes in the frames of a bundle as if each had come by itself. The agent and the
// owner that they are checked against are those of the bundle's subject, which the bus has
// checked. Nothing in it is answered, so only chunks are taken.
func (d *Dispatcher) bundle(m *nats.Msg) {
	line, _ := schemas.CutLastToken(m.Subject)
	now := time.Now()
	for left := m.Data; len(left) > 0; {
		var nonce schemas.Nonce
		var frame []byte
		var err error
		if nonce, frame, left, err = schemas.CutEntry(left); err != nil {
			d.log.Warn("rest of a bundle dropped", "subject", m.Subject, "error", err)
			return
		}
		r := d.reply(nonce)
		if r == nil {
			continue
		}
		f, err := schemas.DecodeFrame(frame)
		switch {
		case err != nil:
			d.log.Warn("frame dropped", "request", r.req.ID, "error", err)
		case f.Kind != schemas.FrameChunk:
			d.log.Warn("frame of a bundle that should be answered dropped", "request", r.req.ID, "kind", f.Kind)
		default:
			if !r.req.Stream { // else it is copied when it is taken in
				// A payload may wait for its reader, and mustn't keep those of others in memory.
				f.Payload = bytes.Clone(f.Payload)
			}
			r.take(line, nonce, "", &f, now)
		}
	}
}
