package access

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/schemas"
)

// cutWait is how long servers are waited for that may have connections of an agent.
const cutWait = time.Second

// Cut closes all connections of an agent, at every server of the cluster. The connection
// is one of bus.UserSystem. Whoever shouldn't come back has to have lost its credential
// before.
func Cut(ctx context.Context, nc *nats.Conn, agent schemas.AgentID) error {
	ctx, cancel := context.WithTimeout(ctx, cutWait)
	defer cancel()
	answers, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		return fmt.Errorf("cut agent %s: %w", agent, err)
	}
	defer answers.Unsubscribe()
	question, err := json.Marshal(map[string]any{"auth": true, "user": agent, "acc": AccountAgents})
	if err != nil {
		return fmt.Errorf("cut agent %s: %w", agent, err)
	}
	if err := nc.PublishRequest("$SYS.REQ.SERVER.PING.CONNZ", answers.Subject, question); err != nil {
		return fmt.Errorf("cut agent %s: %w", agent, err)
	}
	heard := false
	for {
		m, err := answers.NextMsgWithContext(ctx)
		switch {
		case errors.Is(err, context.DeadlineExceeded) && heard: // all have answered, as far as anybody can know
			return nil
		case err != nil:
			return fmt.Errorf("cut agent %s: %w", agent, err)
		}
		heard = true
		var answer connections
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			return fmt.Errorf("cut agent %s: %w", agent, err)
		}
		for _, c := range answer.Data.Connections {
			if c.User != string(agent) {
				continue
			}
			kick, err := json.Marshal(map[string]any{"cid": c.ID})
			if err != nil {
				return fmt.Errorf("cut agent %s: %w", agent, err)
			}
			// A server does it only for who wants an answer, which is like one without connections.
			if err := nc.PublishRequest("$SYS.REQ.SERVER."+answer.Server.ID+".KICK", answers.Subject, kick); err != nil {
				return fmt.Errorf("cut agent %s: %w", agent, err)
			}
		}
	}
}
