package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
)

// identity is who the worker of a data dir is, as pairing has made it. It is kept in a
// file there that only its owner may read.
type identity struct {
	Agent      schemas.AgentID  `json:"agent_id"`
	Tenant     schemas.TenantID `json:"tenant_id"`
	Credential string           `json:"credential"`
	// NATSURL is where the bus is, if the server has said so.
	NATSURL string `json:"nats_url,omitempty"`
	// Server is the edge that has paired this machine, and Pairing by which key; both are
	// empty if none has.
	Server  string `json:"server,omitempty"`
	Pairing string `json:"pairing,omitempty"`
}

// ownFile is the identity of the worker within `ownllm up`.
const ownFile = "agent.json"

// errNotPaired says that a data dir holds no identity.
var errNotPaired = errors.New("this machine isn't paired yet. Make a pairing key with `ownllm agents pair`, and give it to the worker")

// readIdentity returns the identity that a file holds, or an error that wraps
// errNotPaired.
func readIdentity(path string) (id identity, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return id, errNotPaired
	}
	if err == nil {
		err = json.Unmarshal(b, &id)
	}
	if err == nil {
		err = errors.Join(schemas.ValidateID(string(id.Agent), "agt_"), schemas.ValidateID(string(id.Tenant), "ten_"))
	}
	if err == nil {
		_, err = credential.ParseAgent(id.Credential)
	}
	if err != nil {
		return identity{}, fmt.Errorf("%s: %w. Remove the file and pair the machine again", path, err)
	}
	return id, nil
}

// write keeps the identity in a file.
func (id identity) write(path string) error {
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return writeFile(path, string(b))
}

// ownIdentity is that of the worker within `ownllm up`, which needs no pairing. It is made
// on the first run; an agent that an earlier release has made stays the same.
func ownIdentity(ctx context.Context, dir string, store *books.Store, tenant schemas.TenantID) (identity, error) {
	path := filepath.Join(dir, ownFile)
	id, err := readIdentity(path)
	switch {
	case errors.Is(err, errNotPaired):
		id = identity{Agent: schemas.NewAgentID(), Credential: credential.NewAgent().Reveal()}
		if b, err := os.ReadFile(filepath.Join(dir, "agent.id")); err == nil {
			id.Agent = schemas.AgentID(strings.TrimSpace(string(b)))
		}
	case err != nil:
		return identity{}, err
	}
	secret, err := credential.ParseAgent(id.Credential)
	if err != nil {
		return identity{}, err
	}
	agent, err := store.AddAgent(ctx, string(tenant), id.Agent, hostName(), secret)
	if err != nil {
		return identity{}, unavailable(err)
	}
	id.Agent, id.Tenant = agent.ID, agent.Tenant
	return id, id.write(path)
}

// newWorker connects the worker of an agent; leave closes its connections. The address is how
// to connect, but for who connects.
// beside is its way to its server beside the bus, or nil: with one it waits for the bus.
func newWorker(address bus.Config, id identity, beside worker.Aside, backends []backend.Config, drain time.Duration, tel *tele, log *slog.Logger) (w *worker.Worker, leave func(), err error) {
	incarnation := schemas.NewIncarnation()
	address.Password, address.InboxPrefix = id.Credential, schemas.AgentInboxPrefix(id.Agent)
	address.Patient = beside != nil
	c, err := connect(log, address.As(string(id.Agent), schemas.ConnectionName(id.Tenant, incarnation)))
	if err != nil {
		return nil, nil, err
	}
	bulk := bus.NewSideline(address.As(string(id.Agent), "ownllm-worker-bulk"), worker.BulkRest, log)
	w = worker.New(c[0], bulk, worker.Config{
		Tenant: id.Tenant, Agent: id.Agent, Incarnation: incarnation, Host: hostName(), Software: Version(), Aside: beside,
		Backends: backends, Drain: drain, Metrics: tel.metrics, Tracer: tel.tracer,
	}, log)
	return w, func() { c.close(); bulk.Close() }, nil
}

// hostName is the name of this machine, for people.
func hostName() string {
	host, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return host
}
