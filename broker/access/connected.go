package access

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/schemas"
)

// connectedPage is how many connections a server is asked for at once.
const connectedPage = 1024

// connections is the answer of one server about those who are in the agents' account.
type connections struct {
	Server struct {
		ID string `json:"id"`
	} `json:"server"`
	Data struct {
		Total       int `json:"total"`
		Connections []struct {
			ID   uint64 `json:"cid"`
			User string `json:"authorized_user"`
		} `json:"connections"`
	} `json:"data"`
}

// Connected lists the agents that are connected to any server of the cluster, sorted. The
// connection is one of bus.UserSystem. A server that doesn't answer within a second is taken
// for one that has gone; that none does is an error.
func Connected(ctx context.Context, nc *nats.Conn) ([]schemas.AgentID, error) {
	return connected(ctx, nc, connectedPage)
}

func connected(ctx context.Context, nc *nats.Conn, page int) ([]schemas.AgentID, error) {
	ctx, cancel := context.WithTimeout(ctx, cutWait)
	defer cancel()
	answers, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		return nil, fmt.Errorf("list connected agents: %w", err)
	}
	defer answers.Unsubscribe()
	ask := func(subject string, offset int) error {
		question, err := json.Marshal(map[string]any{"auth": true, "acc": AccountAgents, "offset": offset, "limit": page})
		if err != nil {
			return err
		}
		return nc.PublishRequest(subject, answers.Subject, question)
	}
	if err := ask("$SYS.REQ.SERVER.PING.CONNZ", 0); err != nil {
		return nil, fmt.Errorf("list connected agents: %w", err)
	}
	found := make(map[schemas.AgentID]bool)
	seen := make(map[string]int) // connections, by server
	for {
		m, err := answers.NextMsgWithContext(ctx)
		switch {
		case errors.Is(err, context.DeadlineExceeded) && len(seen) > 0:
			return slices.Sorted(maps.Keys(found)), nil
		case err != nil:
			return nil, fmt.Errorf("list connected agents: %w", err)
		}
		var answer connections
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			return nil, fmt.Errorf("list connected agents: %w", err)
		}
		for _, c := range answer.Data.Connections {
			if strings.HasPrefix(c.User, "agt_") {
				found[schemas.AgentID(c.User)] = true
			}
		}
		id := answer.Server.ID
		seen[id] += len(answer.Data.Connections)
		if len(answer.Data.Connections) > 0 && seen[id] < answer.Data.Total {
			if err := ask("$SYS.REQ.SERVER."+id+".CONNZ", seen[id]); err != nil {
				return nil, fmt.Errorf("list connected agents: %w", err)
			}
		}
	}
}
