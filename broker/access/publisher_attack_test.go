package access_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// attack is a server with a house and agents at work, and two publishers of two tenants:
// one that attacks, and one that waits for its replies and results.
type attack struct {
	*bench   // of the agents
	secret   apikey.Key
	evil     *nats.Conn
	ingress  *nats.Conn
	all      *nats.Subscription // that is published in the publishers' account
	attempts int

	refusals sync.Mutex
	list     []error
}

func newAttack(t *testing.T, server site) *attack {
	t.Helper()
	a := &attack{bench: newBench(t, server), secret: apikey.New(), ingress: server.Ingress("house")}
	a.job(other, victim)
	a.evil = server.Open(server.Agents().PublisherConfig(server.Config("evil"), ourKey, a.secret))
	a.evil.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		a.refusals.Lock()
		defer a.refusals.Unlock()
		a.list = append(a.list, err)
	})
	theirs := server.Open(server.Agents().PublisherConfig(server.Config("victim"), theirKey, apikey.New()))
	heard := make(chan *nats.Msg, 64)
	for _, subject := range []string{schemas.PublisherInboxPrefix(theirKey) + ".>", schemas.ResultWildcard(theirKey)} {
		sub, err := theirs.ChanSubscribe(subject, heard)
		a.must(err)
		_ = sub
	}
	a.must(theirs.Flush())
	t.Cleanup(func() {
		if len(heard) > 0 {
			t.Errorf("the other publisher heard %s", (<-heard).Subject)
		}
	})
	var err error
	a.all, err = a.ingress.SubscribeSync(">")
	a.must(err)
	service, err := micro.AddService(a.ingress, micro.Config{Name: "ownllm", Version: "1.0.0"})
	a.must(err)
	t.Cleanup(func() { _ = service.Stop() })
	a.must(a.ingress.Flush())
	return a
}

// calm waits until the server has done all that was asked of it.
func (a *attack) calm() {
	a.t.Helper()
	a.must(a.evil.Flush())
	a.settled()
	a.must(a.ingress.Flush())
}

// through are the messages that came out in the publishers' account since the last call.
func (a *attack) through() (list []*nats.Msg) {
	a.t.Helper()
	for {
		n, _, err := a.all.Pending()
		a.must(err)
		if n == 0 {
			return list
		}
		m, err := a.all.NextMsg(patience)
		a.must(err)
		list = append(list, m)
	}
}

// refused does something that has to be refused, and checks that nothing came of it.
func (a *attack) refused(what string, do func() error) {
	a.t.Helper()
	a.attempts++
	a.heard()
	a.through()
	a.refusals.Lock()
	a.list = nil
	a.refusals.Unlock()
	a.must(do())
	a.calm()
	for _, m := range append(a.through(), a.heard()...) {
		a.t.Errorf("%s lets %s through", what, m.Subject)
	}
	stack.Until(a.t, patience, "word of the refusal: "+what, func() bool {
		a.refusals.Lock()
		defer a.refusals.Unlock()
		return len(a.list) > 0
	})
	a.refusals.Lock()
	defer a.refusals.Unlock()
	if !errors.Is(a.list[0], nats.ErrPermissionViolation) {
		a.t.Errorf("%s: %v", what, a.list[0])
	}
}

// A key opens nothing of another key, of agents, of the house, or of the server.
func TestPublisherIsFencedIn(t *testing.T) { eachSite(t, publisherFencedIn) }

func publisherFencedIn(t *testing.T, server site) {
	a := newAttack(t, server)
	before := fmt.Sprint(a.stored(), a.open(victim))
	stranger := schemas.KeyID(a.secret.Hash().Fingerprint())
	consumer := bus.ConsumerName(victim, model)
	for _, subject := range []string{
		schemas.InSubject(theirKey, schemas.OperationChat), schemas.InSubject(theirKey, schemas.OperationWhoami),
		schemas.InSubject(theirKey, schemas.OperationCancel), schemas.InSubject(theirKey, schemas.OperationSubmit),
		schemas.InSubject(theirKey, schemas.OperationResult), schemas.InSubject(theirKey, schemas.OperationModels),
		schemas.ProgressSubject(theirKey, "own_1", "req_1"),
		schemas.InSubject(stranger, schemas.OperationChat), schemas.InSubject(stranger, schemas.OperationWhoami) + ".more",
		schemas.InSubject("", schemas.OperationChat), schemas.Prefix + "in", schemas.Prefix + "in." + string(ourKey),
		schemas.ResultSubject(theirKey, "x"), schemas.ResultSubject(ourKey, "x"),
		schemas.PublisherInboxPrefix(theirKey) + ".x", schemas.PublisherInboxPrefix(ourKey) + ".x",
		schemas.PeerCancelSubject(theirKey, "req_1"), schemas.PeerCancelSubject(ourKey, "req_1"),
		schemas.JobSubject(tenant, victim, model), schemas.JobSubject(other, victim, model),
		schemas.OutSubject(victim, "own_1", "nonce"), schemas.BodySubject(victim, "own_1", "nonce"),
		schemas.ControlSubject(victim), schemas.HeartbeatSubject(other, victim), schemas.HelloSubject(other, victim),
		schemas.UsageSubject(other, victim), schemas.AsideSubject(other, victim), schemas.AgentInboxPrefix(victim) + ".x",
		"_INBOX.x", "_R_.x.y", "_GR_.x", "ownllm", "x",
		"$SRV.PING", "$SRV.PING.ownllm", "$SRV.INFO", "$SRV.STATS.ownllm",
		"$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.CREATE.MINE", "$JS.API.STREAM.PURGE." + schemas.JobStream(victim),
		"$JS.API.STREAM.DELETE." + schemas.JobStream(victim), "$JS.API.STREAM.MSG.GET." + schemas.JobStream(victim), "$JS.API.DIRECT.GET." + schemas.JobStream(victim),
		"$JS.API.CONSUMER.CREATE." + schemas.JobStream(victim), "$JS.API.CONSUMER.MSG.NEXT." + schemas.JobStream(victim) + "." + consumer,
		"$JS.API.CONSUMER.DELETE." + schemas.JobStream(victim) + "." + consumer, "$JS.ACK." + schemas.JobStream(victim) + "." + consumer + ".1.1.1.1.0",
		"$JS.ACK._.x." + schemas.JobStream(victim) + "." + consumer + ".1.1.1.1.0", "$JS.FC.x", "$KV.x.y", "$O.x.C.y", "$MQTT.msgs.x",
		"$SYS.REQ.USER.AUTH", "$SYS.REQ.USER.INFO", "$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.SERVER.x.KICK",
		"$SYS.REQ.ACCOUNT." + access.AccountIngress + ".CONNZ", "$SYS.ACCOUNT.INGRESS.DISCONNECT", "$SYS.REQ.ACCOUNT.PING.STATZ",
		"$SYS.REQ.CLAIMS.UPDATE", "$G.x", "$GNR.x", "$LDS.x", "$NRG.x",
	} {
		a.refused("publishing to "+subject, func() error {
			m := &nats.Msg{Subject: subject, Reply: schemas.PublisherInboxPrefix(ourKey) + ".a", Data: []byte(`{}`), Header: nats.Header{
				// Claims of another identity.
				"Nats-Request-Info": {`{"acc":"SYS","user":"core"}`}, "Authorization": {"Bearer x"}, "OwnLLM-Key": {string(theirKey)},
			}}
			return a.evil.PublishMsg(m)
		})
	}
	for _, subject := range []string{
		">", "*", "*.>", "_INBOX.>", "_INBOX_*.>", "_INBOX_*.*", "ownllm.>", schemas.Prefix + ">", "$JS.>", "$SYS.>", "$SRV.>", "$SRV.PING", "_R_.>", "$KV.>",
		schemas.InAny, schemas.InWildcard(schemas.OperationChat), schemas.Prefix + "in.>", schemas.Prefix + "in." + string(ourKey) + ".>",
		schemas.InSubject(ourKey, schemas.OperationChat), schemas.InSubject(theirKey, schemas.OperationChat), schemas.ProgressWildcard("own_1"),
		schemas.ResultWildcard(theirKey), schemas.Prefix + "res.>", schemas.Prefix + "res.*.>", schemas.Prefix + "res.*." + string(ourKey),
		schemas.PublisherInboxPrefix(theirKey) + ".>", schemas.PublisherInboxPrefix(theirKey), schemas.PublisherInboxPrefix(ourKey),
		schemas.PeerCancelWildcard, schemas.HeartbeatWildcard, schemas.AsideWildcard, schemas.HelloWildcard, schemas.JobSubjects, schemas.UsageSubjects,
		schemas.OutWildcard("own_1"), schemas.BodyWildcard("own_1"), schemas.ControlSubject(victim), schemas.AgentInboxPrefix(victim) + ".>",
		"$SYS.REQ.USER.AUTH", "$SYS.ACCOUNT.>",
	} {
		for _, queue := range []string{"", "ownllm", "q", "nats-micro"} {
			a.refused("subscribing to "+subject+" in queue "+queue, func() error {
				sub, err := a.evil.QueueSubscribeSync(subject, queue)
				if queue == "" {
					sub, err = a.evil.SubscribeSync(subject)
				}
				t.Cleanup(func() {
					if n, _, err := sub.Pending(); err == nil && n > 0 {
						t.Errorf("a subscription to %s got something", subject)
					}
				})
				return err
			})
		}
	}
	// What others say meanwhile reaches none of these subscriptions.
	for _, subject := range []string{
		schemas.InSubject(theirKey, schemas.OperationChat), schemas.PeerCancelSubject(theirKey, "req_1"), "$SRV.PING", "_INBOX.x",
		schemas.ResultSubject("key_third", "x"),
	} {
		a.must(a.ingress.Publish(subject, []byte("not for you")))
	}
	a.calm()
	if after := fmt.Sprint(a.stored(), a.open(victim)); after != before {
		t.Errorf("the streams hold %s, and held %s", after, before)
	}
	t.Logf("%d attempts", a.attempts)
}

// A reply subject isn't checked by the server. Whatever a publisher forges, nothing is
// published there, and what comes to the house is nothing that it answers.
func TestPublisherForgesReplySubjects(t *testing.T) { eachSite(t, publisherForges) }

func publisherForges(t *testing.T, server site) {
	a := newAttack(t, server)
	theirs := pull(t, a.victim, victim)
	a.calm()
	a.heard()
	before := fmt.Sprint(a.stored(), a.open(victim))
	stranger := schemas.KeyID(a.secret.Hash().Fingerprint())
	for _, reply := range []string{
		"", "x", ">", "*", ".", "_INBOX.x", schemas.PublisherInboxPrefix(theirKey) + ".x", schemas.PublisherInboxPrefix(ourKey), schemas.PublisherInboxPrefix(ourKey) + ".",
		schemas.PublisherInboxPrefix(ourKey) + "2.x", schemas.PublisherInboxPrefix(ourKey) + ".>", schemas.PublisherInboxPrefix(ourKey) + ".*",
		schemas.PublisherInboxPrefix(ourKey) + "..x", schemas.ResultSubject(theirKey, "x"), schemas.Prefix + "res." + string(ourKey),
		schemas.InSubject(ourKey, schemas.OperationChat), schemas.InSubject(theirKey, schemas.OperationCancel), schemas.ProgressSubject(theirKey, "own_1", "req_1"),
		schemas.PeerCancelSubject(theirKey, "req_1"), "$SRV.PING", "$SRV.PING.ownllm", "$SYS.REQ.SERVER.PING", "$SYS.REQ.USER.AUTH", theirs.Reply,
		schemas.JobSubject(other, victim, model), schemas.UsageSubject(other, victim), schemas.ControlSubject(victim), schemas.HeartbeatSubject(other, victim),
		"$JS.API.STREAM.PURGE." + schemas.JobStream(victim), "$JS.API.STREAM.DELETE." + schemas.JobStream(victim), next(victim), "_R_.x.y", "_GR_.x.y",
	} {
		for _, operation := range []string{
			schemas.OperationChat, schemas.OperationModels, schemas.OperationWhoami, schemas.OperationCancel, schemas.OperationSubmit, schemas.OperationResult,
			"nonsense", "progress.own_1.req_1", "a.b.c.d",
		} {
			a.attempts++
			subjects := []string{schemas.Prefix + "in." + string(ourKey) + "." + operation}
			if operation == schemas.OperationWhoami {
				subjects = append(subjects, schemas.InSubject(stranger, operation))
			}
			for _, subject := range subjects {
				if strings.HasPrefix(reply, "_INBOX_") && subject != subjects[0] {
					continue // it names another key than the fingerprint
				}
				// The client library wouldn't send each of these.
				a.raw(fmt.Sprintf("PUB %s %s 2\r\n{}\r\n", subject, reply))
			}
		}
	}
	a.calm()
	for _, m := range a.through() {
		if !strings.HasPrefix(m.Subject, schemas.Prefix+"in."+string(ourKey)+".") && m.Subject != schemas.InSubject(stranger, schemas.OperationWhoami) {
			t.Errorf("%s came out, for %s", m.Subject, m.Reply)
		}
		if schemas.PublisherAnswersTo(m.Subject, m.Reply) {
			t.Errorf("a message to %s is answered to %s", m.Subject, m.Reply)
		}
	}
	for _, m := range a.heard() {
		t.Errorf("%s came out among the agents", m.Subject)
	}
	if after := fmt.Sprint(a.stored(), a.open(victim)); after != before {
		t.Errorf("the streams hold %s, and held %s", after, before)
	}
	t.Logf("%d attempts", a.attempts)
}

// raw sends lines of the protocol by a connection of its own, and waits until the server
// has read them.
func (a *attack) raw(lines string) {
	a.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(a.evil.ConnectedUrl(), "nats://"))
	a.must(err)
	defer conn.Close()
	a.must(conn.SetDeadline(time.Now().Add(patience)))
	_, err = fmt.Fprintf(conn, "CONNECT {\"auth_token\":%q,\"verbose\":false,\"pedantic\":false,\"protocol\":1,\"headers\":true}\r\n%sPING\r\n", a.secret.Reveal(), lines)
	a.must(err)
	for in := bufio.NewScanner(conn); in.Scan(); {
		if strings.HasPrefix(in.Text(), "PONG") || strings.HasPrefix(in.Text(), "-ERR") {
			return
		}
	}
}

// A key lets in clients only: neither a leaf node nor another server of a cluster, nor a
// client of MQTT, where these are open.
func TestKeyOpensNoOtherPort(t *testing.T) {
	leaf, route, gateway, mqtt := stack.FreeAddr(t), stack.FreeAddr(t), stack.FreeAddr(t), stack.FreeAddr(t)
	server := startExternal(t, fmt.Sprintf(`
server_name: hub
leafnodes { listen: %q }
cluster { name: c, listen: %q, routes: ["nats://127.0.0.1:1"], authorization { user: route, password: of-routes } }
gateway { name: c, listen: %q, authorization { user: gateway, password: of-gateways } }
mqtt { listen: %q }
`, leaf, route, gateway, mqtt))
	secret := apikey.New()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	server.Open(server.Agents().PublisherConfig(server.Config("client"), ourKey, secret))
	by := "anybody:" + secret.Reveal() + "@"
	for name, config := range map[string]string{
		"leaf":    fmt.Sprintf(`leafnodes { reconnect: 1, remotes: [{ url: "nats://%s%s" }] }`, by, leaf),
		"route":   fmt.Sprintf(`cluster { name: c, listen: %q, routes: ["nats://%s%s"] }`, stack.FreeAddr(t), by, route),
		"gateway": fmt.Sprintf(`gateway { name: d, listen: %q, gateways: [{ name: c, urls: ["nats://%s%s"] }] }`, stack.FreeAddr(t), by, gateway),
	} {
		path := filepath.Join(t.TempDir(), "evil.conf")
		must(os.WriteFile(path, []byte("server_name: evil-"+name+"\nlisten: \"127.0.0.1:-1\"\n"+config), 0o600))
		p := stack.Run(t, "evil "+name, nil, stack.Binary(t, "github.com/nats-io/nats-server/v2"), "-c", path)
		stack.Until(t, patience, "the refusal of a "+name, func() bool {
			text := strings.ToLower(strings.Join(p.Log(), "\n"))
			return strings.Contains(text, "authorization") || strings.Contains(text, "authentication")
		})
		must(p.Stop())
	}
	system := server.System()
	for what, field := range map[string]string{"LEAFZ": `"leafs":[{`, "ROUTEZ": `"routes":[{`, "GATEWAYZ": `"inbound_gateways":{"`} {
		m, err := system.Request("$SYS.REQ.SERVER.PING."+what, nil, patience)
		must(err)
		if bytes.Contains(bytes.ReplaceAll(m.Data, []byte(" "), nil), []byte(field)) {
			t.Errorf("somebody is there: %s", m.Data)
		}
	}
	// A CONNECT packet of MQTT 3.1.1, clean session, with user and password.
	packet := []byte("\x00\x04MQTT\x04\xc2\x00\x3c")
	for _, field := range []string{"evil", "anybody", secret.Reveal()} {
		packet = append(append(packet, 0, byte(len(field))), field...)
	}
	conn, err := net.Dial("tcp", mqtt)
	must(err)
	defer conn.Close()
	must(conn.SetDeadline(time.Now().Add(patience)))
	_, err = conn.Write(append([]byte{0x10, byte(len(packet))}, packet...))
	must(err)
	answer := make([]byte, 16)
	if n, _ := conn.Read(answer); n >= 4 && answer[3] == 0 {
		t.Errorf("MQTT lets it in: %x", answer[:n])
	}
	if users := connected(t, system); len(users) != 1 { // the client
		t.Errorf("there are %v", users)
	}
}
