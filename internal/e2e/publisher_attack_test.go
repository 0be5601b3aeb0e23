package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// TestPublisherAttacks has a publisher with a valid key send whatever it may send, with
// forged reply subjects, headers and bodies, to the broker of `ownllm up` and to one by
// itself, while a publisher of another tenant has a reply under way.
func TestPublisherAttacks(t *testing.T) {
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		up := stack.StartUp(t, t.TempDir())
		store, err := books.Open(t.Context(), books.Config{URL: up.DatabaseURL})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		key, err := apikey.FromSecret(up.APIKey)
		if err != nil {
			t.Fatal(err)
		}
		token, err := os.ReadFile(filepath.Join(up.DataDir, "nats.token"))
		if err != nil {
			t.Fatal(err)
		}
		attackBroker(t, store, key, up.NATSURL, strings.TrimSpace(string(token)), openLedger(t, up.DatabaseURL))
	})
	t.Run("external", func(t *testing.T) {
		t.Parallel()
		c := startThreeEdges(t)
		attackBroker(t, c.Books, c.Key, c.NATSURL(), c.Token(), c.ledger)
	})
}

// whois asks who a key is, with nothing but the key.
func whois(t *testing.T, url string, key apikey.Key) schemas.Whoami {
	t.Helper()
	stranger := schemas.KeyID(key.Hash().Fingerprint())
	nc := connect(t, url, nats.Token(key.Reveal()), nats.CustomInboxPrefix(schemas.PublisherInboxPrefix(stranger)))
	defer nc.Close()
	m, err := nc.Request(schemas.InSubject(stranger, schemas.OperationWhoami), nil, 10*time.Second)
	var who schemas.Whoami
	if err == nil {
		err = json.Unmarshal(m.Data, &who)
	}
	if err != nil || who.Key == "" {
		t.Fatalf("%+v, %v", who, err)
	}
	return who
}

// attackBroker has a new key of another tenant attack the holder of a key.
func attackBroker(t *testing.T, store *books.Store, key apikey.Key, url, token string, l *ledger) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := store.CreateTenant(ctx, books.NewTenant{Slug: "evil"})
	must(err)
	user, err := store.CreateUser(ctx, books.NewUser{Tenant: "evil", Email: "mallory@example.com"})
	must(err)
	k, secret, err := store.CreateKey(ctx, books.NewKey{Tenant: "evil", User: string(user.ID)})
	must(err)
	ours, theirs := k.ID, whois(t, url, key).Key
	if who := whois(t, url, secret); who.Key != ours || who.Slug != "evil" {
		t.Fatalf("our key is %+v", who)
	}

	// The victim has a long reply under way.
	victim := dial(t, url, func(o *nats.Options) error {
		o.InboxPrefix = schemas.PublisherInboxPrefix(theirs)
		return nats.Token(key.Reveal())(o)
	})
	(&publisher{nc: victim.Conn, key: theirs}).awaitModel(t)
	frames := make(chan *nats.Msg, 65536)
	heard := make(chan *nats.Msg, 1024)
	inbox := victim.NewInbox()
	for subject, to := range map[string]chan *nats.Msg{
		inbox: frames, schemas.PublisherInboxPrefix(theirs) + ".forged.>": heard, schemas.ResultWildcard(theirs): heard,
	} {
		_, err := victim.ChanSubscribe(subject, to)
		must(err)
	}
	body := chatBody(true, map[string]any{"demo": map[string]any{"tokens": 400, "tokens_per_second": 100}})
	must(victim.PublishRequest(schemas.InSubject(theirs, schemas.OperationChat), inbox, body))
	var first schemas.Answer
	for first.Kind != schemas.FrameChunk {
		select {
		case m := <-frames:
			must(json.Unmarshal(m.Data, &first))
		case <-ctx.Done():
			t.Fatal("the victim's reply doesn't begin")
		}
	}

	// All that is published in the publishers' account.
	house, err := bus.Connect(bus.Config{URL: url, User: bus.UserIngress, Password: token}, natstest.Log)
	must(err)
	defer house.Close()
	all := make(chan *nats.Msg, 65536)
	_, err = house.ChanSubscribe(">", all)
	must(err)
	must(house.Flush())

	subjects := []string{schemas.InSubject(schemas.KeyID(secret.Hash().Fingerprint()), schemas.OperationWhoami)}
	for _, operation := range []string{
		schemas.OperationChat, schemas.OperationModels, schemas.OperationWhoami, schemas.OperationCancel, schemas.OperationSubmit, schemas.OperationResult,
		"nonsense", "progress", "progress.own_1." + string(first.Request), "a.b.c", "=", "=00",
	} {
		subjects = append(subjects, schemas.Prefix+"in."+string(ours)+"."+operation)
	}
	forged := []string{
		"", "forged", "_INBOX.forged", schemas.PublisherInboxPrefix(theirs) + ".forged.x", inbox, schemas.ResultSubject(theirs, "forged"),
		schemas.InSubject(theirs, schemas.OperationChat), schemas.InSubject(theirs, schemas.OperationCancel), schemas.InSubject(ours, schemas.OperationChat),
		schemas.PeerCancelSubject(theirs, first.Request), schemas.PublisherInboxPrefix(ours), schemas.PublisherInboxPrefix(ours) + "x.forged",
		schemas.PublisherInboxPrefix(ours) + ".>", schemas.PublisherInboxPrefix(ours) + ".*.x", "$SRV.PING", "$SRV.STATS.ownllm",
		"$SYS.REQ.SERVER.PING", "$JS.API.STREAM.PURGE." + schemas.JobStreamPrefix + "00", "$JS.API.STREAM.DELETE." + schemas.JobStreamPrefix + "00", schemas.JobStreamPrefix + "00",
	}
	bodies := []string{"", "{}", string(chatBody(true, nil)), fmt.Sprintf(`{"request_id":%q}`, first.Request)}
	headers := fmt.Sprintf("NATS/1.0\r\nAuthorization: Bearer %s\r\nOwnLLM-Key: %s\r\nX-Tenant: %s\r\nNats-Request-Info: {\"acc\":\"SYS\"}\r\n\r\n",
		"sk-ownllm-0000000000000000", theirs, theirs)
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "nats://"))
	must(err)
	defer conn.Close()
	must(conn.SetDeadline(time.Now().Add(time.Minute)))
	out := bufio.NewWriter(conn)
	fmt.Fprintf(out, "CONNECT {\"auth_token\":%q,\"verbose\":false,\"headers\":true,\"protocol\":1}\r\n", secret.Reveal())
	sent := 0
	for _, subject := range subjects {
		for _, reply := range forged {
			for _, body := range bodies {
				fmt.Fprintf(out, "HPUB %s %s %d %d\r\n%s%s\r\n", subject, reply, len(headers), len(headers)+len(body), headers, body)
				sent++
			}
		}
	}
	// With a reply subject that is ours, to see the errors, and that all before was taken.
	ok := schemas.PublisherInboxPrefix(ours) + ".mine"
	answered := map[string]string{
		schemas.OperationCancel: fmt.Sprintf(`{"request_id":%q}`, first.Request),
		schemas.OperationChat:   string(chatBody(true, nil)),
		schemas.OperationModels: `{"key_id":"` + string(theirs) + `"}`,
		schemas.OperationWhoami: `{"key_id":"` + string(theirs) + `"}`,
	}
	fmt.Fprintf(out, "SUB %s.> 1\r\n", ok)
	for operation, body := range answered {
		fmt.Fprintf(out, "HPUB %s %s %d %d\r\n%s%s\r\n", schemas.InSubject(ours, operation), ok+"."+operation, len(headers), len(headers)+len(body), headers, body)
	}
	must(out.Flush())
	answers := make(map[string]string)
	in := bufio.NewReader(conn)
	for len(answers) < len(answered) {
		line, err := in.ReadString('\n')
		must(err)
		switch fields := strings.Fields(line); {
		case strings.HasPrefix(line, "PING"):
			_, err = conn.Write([]byte("PONG\r\n"))
			must(err)
		case strings.HasPrefix(line, "MSG ") || strings.HasPrefix(line, "HMSG "):
			data, err := in.ReadString('\n')
			must(err)
			answers[schemas.LastToken(fields[1])] = data
		case strings.HasPrefix(line, "-ERR 'Authorization"), strings.HasPrefix(line, "-ERR 'Stale"):
			t.Fatal(line)
		}
	}
	for operation, want := range map[string]string{
		schemas.OperationCancel: `"error"`,                        // it isn't ours, and isn't there for all that we know
		schemas.OperationChat:   `"error"`,                        // our tenant has no model
		schemas.OperationModels: string(schemas.CodeAgentOffline), // as is said to whoever has no agent
		schemas.OperationWhoami: string(ours),
	} {
		if got := answers[operation]; !strings.Contains(got, want) || strings.Contains(got, string(theirs)) {
			t.Errorf("%s is answered with %s", operation, got)
		}
	}

	// The victim's reply is whole.
	seq := first.Seq
	for end := first; end.Kind != schemas.FrameDone; seq = end.Seq {
		select {
		case m := <-frames:
			end = schemas.Answer{}
			must(json.Unmarshal(m.Data, &end))
		case <-ctx.Done():
			t.Fatalf("the victim's reply doesn't end after message %d", seq)
		}
		if end.Seq != seq+1 || end.Request != first.Request || end.Kind == schemas.FrameError {
			t.Fatalf("after %d the victim gets %+v %+v", seq, end, end.Error)
		}
	}
	must(house.Flush())
	if len(heard) > 0 {
		t.Errorf("the victim hears %s", (<-heard).Subject)
	}
	for range len(all) {
		m := <-all
		fromUs := strings.HasPrefix(m.Subject, schemas.Prefix+"in."+string(ours)+".") || m.Subject == subjects[0]
		toUs := strings.HasPrefix(m.Subject, ok+".")
		toVictim := m.Subject == inbox || strings.HasPrefix(m.Subject, schemas.Prefix+"in."+string(theirs)+".progress.")
		lookedFor := m.Subject == schemas.PeerCancelSubject(ours, first.Request) // of our key: nobody has it
		houseInbox := strings.HasPrefix(m.Subject, "_INBOX.") && m.Subject != "_INBOX.forged"
		if !fromUs && !toUs && !toVictim && !lookedFor && !houseInbox {
			t.Errorf("%s was published: %.200s", m.Subject, m.Data)
		}
	}
	for id, e := range l.wantClosed(theirs, 30*time.Second) {
		if id != string(first.Request) || e.Outcome != "done" {
			t.Errorf("the ledger of the victim has %s: %+v", id, e)
		}
	}
	if mine := l.wantClosed(ours, 30*time.Second); len(mine) > 0 {
		t.Errorf("the ledger has %v", mine)
	}
	t.Logf("%d attempts", sent)
}
