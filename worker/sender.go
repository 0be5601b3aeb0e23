package worker

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
)

// sender numbers the frames of one run, publishes them, and keeps each until the
// owner has taken it. It is the sending half of a go-back-n protocol: the owner takes
// frames in order only, says with every verdict which one it expects next, and the
// sender goes back to that one when something got lost.
type sender struct {
	w       *Worker
	id      string // of the run
	subject string // of the frames
	inbox   string // verdicts come there
	owner   schemas.OwnerID
	nonce   schemas.Nonce
	bundles bool // the owner takes bundles
	stop    context.CancelCauseFunc
	heard   chan struct{} // closed once the owner has the last frame, or wants none
	room    chan struct{} // holds one token: the owner has taken frames
	goes    chan struct{} // closed once the owner has said go; nil: that isn't waited for

	mu         sync.Mutex
	ackSubject string // of the latest delivery
	claimed    bool   // the claim was sent
	loading    bool
	granted    bool   // the owner has said go
	last       uint64 // number of the last frame sent
	tokens     int
	usage      schemas.Usage // of all that was sent; the prompt is 0 if it isn't known
	prompt     int           // the size of the prompt for the owner, 0 if it isn't known
	wanted     int           // the tokens that the reply needs to go on; 0: it isn't held up
	terminal   bool          // the last frame is the final one
	closed     bool          // heard is closed
	settled    bool          // the owner has the end of the run, or has ended it
	kept       []kept
	buf        []byte    // the frames that are kept, end to end
	pooled     *[]byte   // where buf comes from; nil: there was no frame yet
	bundle     uint64    // the one that has the last frame that was published; 0: none
	unasked    int       // bytes of frames sent since the last request
	spoke      time.Time // when the owner last answered
	missing    time.Time // since when the bus says that there is no owner
	back       uint64    // the frame that was last gone back to
	backAt     time.Time // and when
	reported   time.Time // when the state of the run was last reported
	extended   time.Time // when JetStream was last told that the job is at hand
}

// kept is a frame in sender.buf.
type kept struct {
	seq   uint64
	start int
	final bool
}

// errFenced ends a run that the owner doesn't want: another one has the job.
var errFenced = errors.New("the owner has another run for the job")

const (
	progressEvery = time.Second
	// pumpEvery is how exact that second is.
	pumpEvery = 50 * time.Millisecond
	// ownerWait is how long a worker waits for an owner that the bus doesn't find: an
	// edge that reconnects takes some hundred milliseconds.
	ownerWait = 3 * time.Second
	// ownerSilence is how long an owner may leave frames unanswered.
	ownerSilence = 15 * time.Second
	// lastWordWait is how long a worker tries to bring its last frame home.
	lastWordWait = 20 * time.Second
	// maxKept is how many bytes of frames are kept at the most for an owner that hasn't
	// taken them yet; then the backend has to wait. askEvery is after how many an owner is
	// asked what it has, if a second hasn't passed before.
	maxKept  = 8 << 20
	askEvery = 1 << 20
	// backEvery is how long one going back is given to succeed, before a verdict that
	// shows the same gap causes another.
	backEvery = 250 * time.Millisecond
)

func newSender(w *Worker, job *schemas.Job, ackSubject string, stop context.CancelCauseFunc) *sender {
	id, now := string(schemas.NewNonce()), time.Now()
	s := &sender{
		w: w, id: id, subject: schemas.OutSubject(w.cfg.Agent, job.Owner, job.Nonce),
		inbox: w.inbox + "." + id, stop: stop, heard: make(chan struct{}), room: make(chan struct{}, 1),
		owner: job.Owner, nonce: job.Nonce, bundles: job.Bundle, ackSubject: ackSubject, spoke: now, reported: now, extended: now,
	}
	if job.Hold {
		s.goes = make(chan struct{})
	}
	if from := job.Continue; from != nil {
		s.tokens, s.usage = from.Tokens, schemas.Usage{PromptTokens: from.PromptTokens, CompletionTokens: from.Tokens}
	}
	return s
}

// claim asks the owner whether the run may go on. The answer isn't waited for, unless by
// awaitGo: frames that follow on the same connection reach the owner after the claim.
func (s *sender) claim(loading bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loading = loading
	if s.claimed {
		s.report()
		return
	}
	s.claimed, s.spoke = true, time.Now()
	s.report()
}

// awaitGo waits, if the job says so, until the owner has granted the claim.
func (s *sender) awaitGo(ctx context.Context) error {
	if s.goes == nil {
		return nil
	}
	select {
	case <-s.goes:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// report sends the state of the run as a request: as a claim until that is granted, as
// progress from then on. s.mu is held.
func (s *sender) report() {
	f := schemas.Frame{Run: s.id, Seq: s.last, Kind: schemas.FrameClaim, Tokens: max(s.tokens, s.wanted), Loading: s.loading}
	if s.granted {
		f.Kind, f.PromptTokens = schemas.FrameProgress, s.prompt
	}
	s.unasked = 0
	b, err := schemas.AppendFrame(nil, &f)
	if err != nil {
		s.w.log.Error("frame not encoded", "error", err)
		return
	}
	s.publish(b, true)
}

// counted tells the owner, now and with each report, how many tokens the prompt has.
func (s *sender) counted(prompt int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prompt, s.usage.PromptTokens = prompt, prompt
	if s.granted && !s.closed {
		s.report()
	}
}

// spent notes how many tokens the prompt had, unless that isn't known.
func (s *sender) spent(prompt int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.usage.PromptTokens = max(prompt, s.usage.PromptTokens)
}

// hold tells the owner, now and with each report, how many tokens the reply needs to go
// on; 0 says that it goes on.
func (s *sender) hold(wanted int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wanted = wanted
	if wanted > 0 && !s.closed {
		s.report()
	}
}

// chunk sends lines of the reply. The lines may be reused once it returns. It waits
// for an owner that is too far behind, so that what is kept has a bound.
func (s *sender) chunk(ctx context.Context, lines []byte, tokens int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.buf) > 0 && len(s.buf)+len(lines) > maxKept {
		s.mu.Unlock()
		select {
		case <-s.room:
		case <-ctx.Done():
		}
		s.mu.Lock()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	s.send(&schemas.Frame{Kind: schemas.FrameChunk, Tokens: tokens, Payload: lines})
	if s.unasked > askEvery {
		s.report()
	}
	return nil
}

// done sends the last frame of a reply.
func (s *sender) done(lines []byte, tokens int, usage schemas.Usage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.send(&schemas.Frame{Kind: schemas.FrameDone, Tokens: tokens, Usage: &usage, Payload: lines})
}

// fail sends the error that ends a reply.
func (s *sender) fail(err *schemas.Error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.claimed {
		s.claimed, s.spoke = true, time.Now()
		s.report()
	}
	s.send(&schemas.Frame{Kind: schemas.FrameError, Tokens: s.tokens, Error: err})
}

// send numbers a frame, keeps it and publishes it. s.mu is held.
func (s *sender) send(f *schemas.Frame) {
	f.Run, f.Seq = s.id, s.last+1
	if s.pooled == nil {
		s.pooled = frameBuffers.Get().(*[]byte) // holds nothing else
		s.buf = *s.pooled
	}
	start := len(s.buf)
	buf, err := schemas.AppendFrame(s.buf, f)
	if err != nil {
		s.w.log.Error("frame not encoded", "error", err)
		return
	}
	s.buf, s.last, s.tokens, s.loading = buf, f.Seq, f.Tokens, false
	if s.usage.CompletionTokens = f.Tokens; f.Usage != nil {
		s.usage = *f.Usage
	}
	s.terminal = f.Kind.Terminal()
	s.kept = append(s.kept, kept{f.Seq, start, s.terminal})
	s.unasked += len(buf) - start
	s.publish(s.buf[start:], s.terminal)
}

// frameBuffers are what frames are kept in. One that has grown beyond maxPooled isn't kept.
var frameBuffers = sync.Pool{New: func() any { return new([]byte) }}

// discard drops what is kept, at the end of a run.
func (s *sender) discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pooled != nil && cap(s.buf) <= maxPooled {
		*s.pooled = s.buf[:0]
		frameBuffers.Put(s.pooled)
	}
	s.kept, s.buf, s.pooled = nil, nil, nil
}

// publish sends a frame, as a request if it has to be answered, else perhaps in a bundle. What
// is lost on the way is sent again when a verdict shows the gap. s.mu is held.
func (s *sender) publish(frame []byte, request bool) {
	// The first token of a reply waits for nobody.
	if s.bundles && !request && s.last > 1 {
		if s.bundle = s.w.bundles.add(s.owner, s.nonce, frame, s.bundle); s.bundle != 0 {
			return
		}
	} else if s.bundle != 0 {
		s.w.bundles.send(s.owner, s.bundle)
		s.bundle = 0
	}
	var err error
	if request {
		err = s.w.tokens.PublishRequest(s.subject, s.inbox, frame)
	} else {
		err = s.w.tokens.Publish(s.subject, frame)
	}
	if err != nil && !bus.Down(err) {
		s.w.log.Warn("frame not sent", "error", err)
	}
}

// answered takes in a verdict of the owner.
func (s *sender) answered(v schemas.Verdict, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spoke, s.missing = now, time.Time{}
	s.w.departed.remove(s.owner)
	if !v.Go {
		s.settled = true
		s.close()
		if v.Reason == schemas.ReasonSuperseded {
			s.stop(errFenced)
		} else {
			s.stop(errCancelled)
		}
		return
	}
	if !s.granted {
		s.granted = true
		if s.goes != nil {
			close(s.goes)
		}
		if s.prompt > 0 {
			s.report() // which the claim couldn't tell
		}
	}
	s.drop(v.Next)
	if v.Next > s.last {
		if s.terminal {
			s.settled = true
			s.close()
		}
		return
	}
	// One gap shows in every verdict until what was sent again has arrived.
	if v.Next <= v.Seq && (v.Next != s.back || now.Sub(s.backAt) >= backEvery) {
		s.back, s.backAt = v.Next, now
		for i, k := range s.kept {
			end := len(s.buf)
			if i+1 < len(s.kept) {
				end = s.kept[i+1].start
			}
			s.publish(s.buf[k.start:end], k.final)
		}
	}
}

// drop forgets the frames before next. s.mu is held.
func (s *sender) drop(next uint64) {
	n := 0
	for n < len(s.kept) && s.kept[n].seq < next {
		n++
	}
	switch n {
	case 0:
		return
	case len(s.kept):
		s.kept, s.buf = s.kept[:0], s.buf[:0]
		signal(s.room)
		return
	}
	signal(s.room)
	cut := s.kept[n].start
	s.buf = s.buf[:copy(s.buf, s.buf[cut:])]
	s.kept = s.kept[:copy(s.kept, s.kept[n:])]
	for i := range s.kept {
		s.kept[i].start -= cut
	}
}

func (s *sender) close() {
	if !s.closed {
		s.closed = true
		close(s.heard)
	}
}

// ownerSilent notes that the bus finds no owner. One that stays away is gone, and then none
// of its other requests is waited for.
func (s *sender) ownerSilent(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	departed := s.w.departed.has(s.owner)
	if s.missing.IsZero() {
		s.missing = now
	}
	if departed || now.Sub(s.missing) > ownerWait {
		s.w.departed.add(s.owner)
		s.close()
		s.stop(errOwnerGone)
	}
}

// tick reports to the owner once a second, or at once if force is set, and gives up on
// one that has been silent for too long though the bus is there. Every run has its
// own second, so that many don't report in one burst, which would delay tokens. It
// also keeps JetStream from delivering again what is at hand.
func (s *sender) tick(now time.Time, connected, force bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.extended) >= bus.AckWait/3 {
		s.extended = now
		s.w.ack(s.ackSubject, ackProgress)
	}
	if !force && now.Sub(s.reported) < progressEvery {
		return
	}
	s.reported = now
	switch {
	case !s.claimed || s.closed:
	case !connected:
		// Nobody can be heard, and who was missing before may be back.
		s.spoke, s.missing = now, time.Time{}
	case now.Sub(s.spoke) > ownerSilence:
		s.close()
		s.stop(errOwnerGone)
	default:
		s.report()
	}
}

// redelivered notes that the job was delivered again.
func (s *sender) redelivered(ackSubject string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ackSubject = ackSubject
}

// settle acknowledges the job.
func (s *sender) settle(word string) {
	s.mu.Lock()
	subject := s.ackSubject
	s.mu.Unlock()
	s.w.ack(subject, word)
}

// awaitHeard waits until the owner has the last frame, or can't be brought to take it,
// or the worker's life ends.
func (s *sender) awaitHeard(life context.Context) {
	timer := time.NewTimer(lastWordWait)
	defer timer.Stop()
	select {
	case <-s.heard:
	case <-timer.C:
	case <-life.Done():
	}
}

// unsettled returns what the run has burnt, and whether its owner may not know that.
func (s *sender) unsettled() (schemas.Usage, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usage, !s.settled
}

// pump reports on all runs, and at once when the bus is back, and begins what is late.
func (w *Worker) pump(ctx context.Context) error {
	tick := time.NewTicker(pumpEvery)
	defer tick.Stop()
	for {
		force := false
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-w.reconnected:
			force = true
		}
		now, connected, runs := time.Now(), w.tokens.IsConnected(), w.list()
		w.bundles.look(now, runs)
		for _, r := range runs {
			r.tick(now, connected, force)
			r.count.look(now)
			r.silence.look(now)
		}
	}
}
