package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// StreamVersion is the version of how this build configures its streams. It is raised when
// an older build would take something back that a newer one needs.
const StreamVersion = 1

// streamVersionKey is where a stream says by which version it was configured.
const streamVersionKey = "ownllm.version"

var (
	// ErrNewerStream says that a later release has configured a stream.
	ErrNewerStream = errors.New("a later release of ownllm has configured it; install that one here, too")
	// ErrMoreReplicas says that a stream has more copies than is asked for.
	ErrMoreReplicas = errors.New("it has more copies than --queue-replicas asks for; give all brokers the same, or lower it by hand with `nats stream edit`")
	// ErrOldStream says that jobs wait in the stream of a build before there were shards.
	ErrOldStream = errors.New("an earlier build of ownllm has put jobs into it; stop that one and wait until they have ended, or delete the stream with `nats stream rm`")
)

// singleStream held the jobs of all agents before there were shards. It captures the same
// subjects, which the server allows only once.
const singleStream = "OWNLLM_JOBS"

// retire deletes singleStream, if it is there and nothing is in it.
func (q *Queue) retire(ctx context.Context) error {
	stream, err := q.js.Stream(ctx, singleStream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err == nil {
		if n := stream.CachedInfo().State.Msgs; n > 0 {
			err = fmt.Errorf("%d jobs: %w", n, ErrOldStream)
		} else if err = q.js.DeleteStream(ctx, singleStream); errors.Is(err, jetstream.ErrStreamNotFound) {
			err = nil // another broker was faster
		}
	}
	if err != nil {
		return fmt.Errorf("retire stream %s: %w", singleStream, err)
	}
	return nil
}

// patiently asks JetStream for something, and again for as long as ctx allows while it has
// no leader to answer, or a server that is needed for a copy is away, as some are while a
// cluster starts: what is asked of a cluster then is often never answered at all.
func patiently(ctx context.Context, ask func(context.Context) error) error {
	const try = 5 * time.Second
	for {
		tryCtx, cancel := context.WithTimeout(ctx, try)
		err := ask(tryCtx)
		cancel()
		if err == nil || !Down(err) && !leaderless(err) && !serverAway(err) {
			return err
		}
		timer := time.NewTimer(lookMost)
		select {
		case <-ctx.Done():
			timer.Stop()
			return err
		case <-timer.C:
		}
	}
}

// serverAway reports whether err is what JetStream says when there would be servers enough for
// a stream's copies if all were there.
func serverAway(err error) bool {
	const noPeers jetstream.ErrorCode = 10005 // the reason is in the text alone
	var api *jetstream.APIError
	return errors.As(err, &api) && api.ErrorCode == noPeers && strings.Contains(api.Description, "peer offline")
}

// provision creates or updates a stream, unless that would take it back.
func (q *Queue) provision(ctx context.Context, cfg jetstream.StreamConfig) error {
	cfg.Metadata = map[string]string{streamVersionKey: strconv.Itoa(StreamVersion)}
	err := patiently(ctx, func(ctx context.Context) error {
		if err := q.mayProvision(ctx, cfg); err != nil {
			return err
		}
		_, err := q.js.CreateOrUpdateStream(ctx, cfg)
		return err
	})
	if err != nil {
		return fmt.Errorf("provision stream %s: %w", cfg.Name, err)
	}
	return nil
}

// mayProvision compares a stream that is there with what it would become.
func (q *Queue) mayProvision(ctx context.Context, cfg jetstream.StreamConfig) error {
	stream, err := q.js.Stream(ctx, cfg.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	have := stream.CachedInfo().Config
	if text := have.Metadata[streamVersionKey]; text != "" { // earlier builds said nothing
		version, err := strconv.Atoi(text)
		if err != nil || version > StreamVersion {
			return fmt.Errorf("its configuration is of version %s, and this build knows %d: %w", text, StreamVersion, ErrNewerStream)
		}
	}
	if have.Replicas > cfg.Replicas {
		return fmt.Errorf("%d copies, not %d: %w", have.Replicas, cfg.Replicas, ErrMoreReplicas)
	}
	return nil
}
