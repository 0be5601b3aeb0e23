package books

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// submissionChannel is where the functions of the submissions tell that some key has its
// turn.
const submissionChannel = "ownllm_submissions"

// ListenSubmissions calls wake whenever something can be claimed that couldn't before, and
// once when it begins to listen, until ctx ends or the connection does. Words may get lost
// with a connection. It has a connection of its own. wake must not block.
func (s *Store) ListenSubmissions(ctx context.Context, wake func()) error {
	connect, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(connect, s.pool.Config().ConnConfig)
	if err != nil {
		return translate(ctx, "listen to submissions", err)
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing is lost with it
	if _, err := conn.Exec(connect, `LISTEN `+submissionChannel); err != nil {
		return translate(ctx, "listen to submissions", err)
	}
	for {
		wake()
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return translate(ctx, "listen to submissions", err)
		}
	}
}
