package access_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

const (
	ourKey   = schemas.KeyID("key_mallory")
	theirKey = schemas.KeyID("key_victim")
)

// A client needs nothing but a key, as token or as password, and reaches what is its own.
func TestPublisherConnects(t *testing.T) { eachSite(t, publisherConnects) }

func publisherConnects(t *testing.T, server site) {
	key, house, system := apikey.New(), server.Ingress("house"), server.System()
	server.Agents().Issue(ourKey, key, 0)
	stranger := schemas.KeyID(key.Hash().Fingerprint())
	asked, err := house.SubscribeSync(">")
	if err != nil {
		t.Fatal(err)
	}
	for name, how := range map[string]nats.Option{
		"token":               nats.Token(key.Reveal()),
		"password":            nats.UserInfo("anybody", key.Reveal()),
		"password of no user": nats.UserInfo("", key.Reveal()),
		"another's name":      nats.UserInfo(string(theirKey), key.Reveal()),
		"an agent's name":     nats.UserInfo(string(victim), key.Reveal()),
	} {
		for _, as := range []schemas.KeyID{ourKey, stranger} {
			nc, err := nats.Connect(server.Config("").URL, how, nats.CustomInboxPrefix(schemas.PublisherInboxPrefix(as)))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			refused := make(chan error, 16)
			nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { refused <- err })
			operations := []string{schemas.OperationWhoami}
			if as == ourKey {
				operations = append(operations, schemas.OperationChat, schemas.OperationSubmit, "progress.own_1.req_1")
			}
			for _, operation := range operations {
				subject := schemas.Prefix + "in." + string(as) + "." + operation
				replies, err := nc.SubscribeSync(nc.NewInbox())
				if err == nil {
					err = nc.PublishRequest(subject, replies.Subject, []byte(`{}`))
				}
				if err != nil {
					t.Fatal(err)
				}
				m, err := asked.NextMsg(patience)
				if err != nil || m.Subject != subject || !schemas.PublisherAnswersTo(m.Subject, m.Reply) {
					t.Fatalf("%s: to %s came %v, %v", name, subject, m, err)
				}
				for range 3 { // a reply is many frames
					if err := m.Respond([]byte("frame")); err != nil {
						t.Fatal(err)
					}
					if got, err := replies.NextMsg(patience); err != nil || string(got.Data) != "frame" {
						t.Fatalf("%s: the answer is %v, %v", name, got, err)
					}
					if got, err := asked.NextMsg(patience); err != nil || got.Subject != replies.Subject {
						t.Fatalf("%v, %v", got, err)
					}
				}
			}
			results, err := nc.SubscribeSync(schemas.ResultWildcard(ourKey))
			if err == nil {
				err = nc.Flush()
			}
			if err == nil {
				err = house.Publish(schemas.ResultSubject(ourKey, "mine"), nil)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := results.NextMsg(patience); err != nil {
				t.Errorf("%s: no result: %v", name, err)
			}
			if _, err := asked.NextMsg(patience); err != nil {
				t.Fatal(err)
			}
			if users := connected(t, system); len(users) != 1 || users[0] != string(ourKey)+"."+string(stranger) {
				t.Errorf("%s: the server knows %v", name, users)
			}
			nc.Close()
			if len(refused) > 0 {
				t.Errorf("%s: refused: %v", name, <-refused)
			}
			stack.Until(t, patience, "the server to see it go", func() bool { return len(connected(t, system)) == 0 })
		}
	}
}

// connected are the users in the publishers' account, but for the house.
func connected(t *testing.T, system *nats.Conn) (users []string) {
	t.Helper()
	m, err := system.Request("$SYS.REQ.SERVER.PING.CONNZ", fmt.Appendf(nil, `{"auth":true,"acc":%q}`, access.AccountIngress), patience)
	if err != nil {
		t.Fatal(err)
	}
	var answer struct {
		Data struct {
			Connections []struct {
				User string `json:"authorized_user"`
			} `json:"connections"`
		} `json:"data"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		t.Fatal(err)
	}
	for _, c := range answer.Data.Connections {
		if c.User != "ingress" {
			users = append(users, c.User)
		}
	}
	return users
}

func TestBadKeysOpenNothing(t *testing.T) { eachSite(t, badKeys) }

func badKeys(t *testing.T, server site) {
	key, token := apikey.New(), server.Config("").Password
	server.Agents().Issue(ourKey, key, 0)
	for name, how := range map[string][]nats.Option{
		"unknown key":                {nats.Token(apikey.New().Reveal())},
		"unknown key as password":    {nats.UserInfo("anybody", apikey.New().Reveal())},
		"key as user":                {nats.UserInfo(key.Reveal(), "")},
		"key of a system user":       {nats.UserInfo("ingress", key.Reveal())},
		"fingerprint":                {nats.Token(key.Hash().Fingerprint())},
		"id":                         {nats.Token(string(ourKey))},
		"a longer key":               {nats.Token(key.Reveal() + "x")},
		"the token of the house":     {nats.Token(token)},
		"the house's, by another":    {nats.UserInfo("anybody", token)},
		"bad token, but a password":  {nats.Token("x"), nats.UserInfo("anybody", key.Reveal())},
		"nothing":                    {},
		"an unknown system user":     {nats.UserInfo("admin", token)},
		"credential of an agent":     {nats.Token(natstest.Credential(victim).Reveal())},
		"an agent's, by a publisher": {nats.UserInfo(string(ourKey), natstest.Credential(victim).Reveal())},
	} {
		if nc, err := nats.Connect(server.Config("").URL, how...); err == nil {
			nc.Close()
			t.Errorf("%s opens the server", name)
		} else if !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("%s gets %v", name, err)
		}
	}
}

// A client can't hide behind another name from whoever cuts it off.
func TestNobodyHides(t *testing.T) { eachSite(t, nobodyHides) }

func nobodyHides(t *testing.T, server site) {
	key, system := apikey.New(), server.System()
	server.Agents().Issue(ourKey, key, 0)
	for _, more := range []string{`"nkey":"UABC"`, `"jwt":"eyJ"`, `"nkey":"UABC","jwt":"eyJ","sig":"x"`, `"user":"core"`, `"user":"ingress"`} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(server.Config("").URL, "nats://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "CONNECT {\"auth_token\":%q,\"verbose\":false,%s}\r\nPING\r\n", key.Reveal(), more)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		in := false
		for lines := bufio.NewScanner(conn); lines.Scan() && !strings.HasPrefix(lines.Text(), "-ERR"); {
			if in = lines.Text() == "PONG"; in {
				break
			}
		}
		if users := connected(t, system); in && (len(users) != 1 || users[0] != string(ourKey)+"."+key.Hash().Fingerprint()) {
			t.Errorf("with %s the server knows %v", more, users)
		}
		_ = conn.Close()
		stack.Until(t, patience, "the server to see it go", func() bool { return len(connected(t, system)) == 0 })
	}
}

// A key's end ends its connections, and no others.
func TestKeyEndsConnections(t *testing.T) { eachSite(t, keyEnds) }

func keyEnds(t *testing.T, server site) {
	const remaining = 1500 * time.Millisecond
	key := apikey.New()
	lost := make(chan string, 16)
	open := func(name string, id schemas.KeyID, key apikey.Key) *nats.Conn {
		return server.Open(server.Agents().PublisherConfig(server.Config(name), id, key))
	}
	bystander := open("bystander", theirKey, apikey.New())
	bystander.SetDisconnectErrHandler(func(*nats.Conn, error) { lost <- "bystander" })
	cfg := server.Agents().PublisherConfig(server.Config("ending"), ourKey, key)
	server.Agents().Issue(ourKey, key, remaining)
	// Its time runs from some moment between these two.
	asked := time.Now()
	nc := server.Open(cfg)
	opened := time.Now()
	nc.SetDisconnectErrHandler(func(*nats.Conn, error) { lost <- "ending" })
	server.Agents().Revoke(key)
	select {
	case name := <-lost:
		// A server counts in whole seconds, from the last to the next; and the cores are busy.
		if since := time.Since(asked); name != "ending" || since < remaining || time.Since(opened) > remaining+2*time.Second+1500*time.Millisecond {
			t.Errorf("%s was cut off after %s", name, since)
		} else {
			t.Logf("cut off %s after the end", since-remaining)
		}
	case <-time.After(patience):
		t.Fatal("it is still there")
	}
	if len(lost) > 0 || !bystander.IsConnected() {
		t.Error("another was cut off")
	}
}
