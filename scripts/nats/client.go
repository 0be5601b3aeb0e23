// A client of OwnLLM over NATS, with the official NATS client for Go (nats.go).
//
//	export NATS_URL=nats://127.0.0.1:4222 OWNLLM_API_KEY=sk-ownllm-...
//	go run ./scripts/nats chat '{"model":"demo","stream":true,"messages":[{"role":"user","content":"Hi"}]}'
//	go run ./scripts/nats submit my-id '{"model":"demo","messages":[{"role":"user","content":"Hi"}]}'
//	go run ./scripts/nats result my-id
//	go run ./scripts/nats ask whoami
//
// README.md in this folder describes commands, output and exit codes.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	silence  = 15 * time.Second // while a request lives, something comes every second
	deadline = 15 * time.Minute // of everything
)

// answer is what a client hears: schemas/json/ingress-*.json have all fields.
type answer struct {
	Seq       int             `json:"seq"`
	Kind      string          `json:"kind"`
	RequestID string          `json:"request_id"`
	Chunk     completion      `json:"chunk"`
	Whole     completion      `json:"completion"`
	Usage     json.RawMessage `json:"usage"`
	State     string          `json:"state"`  // of a result
	KeyID     string          `json:"key_id"` // of whoami
	raw       []byte
}

type completion struct {
	Choices []struct {
		Delta, Message struct{ Content string }
	}
}

// refused is what OwnLLM says is wrong: the answer, with its field "error".
type refused []byte

func (r refused) Error() string { return string(r) }

func decode(data []byte) (a answer, err error) {
	if err := json.Unmarshal(data, &a); err != nil {
		return a, err
	}
	a.raw = data
	if a.Kind == "error" {
		return a, refused(data)
	}
	return a, nil
}

type client struct {
	nc  *nats.Conn
	key string
}

func dial(inbox string) (*client, error) {
	nc, err := nats.Connect(cmp.Or(os.Getenv("NATS_URL"), nats.DefaultURL),
		nats.Token(os.Getenv("OWNLLM_API_KEY")),
		nats.CustomInboxPrefix("_INBOX_"+inbox)) // answers go nowhere else
	return &client{nc, inbox}, err
}

// connect connects. Who has only the secret of a key asks for its id, under the secret's
// SHA-256.
func connect(ctx context.Context) (*client, error) {
	key := os.Getenv("OWNLLM_KEY_ID")
	if key == "" {
		fingerprint := sha256.Sum256([]byte(os.Getenv("OWNLLM_API_KEY")))
		stranger, err := dial(hex.EncodeToString(fingerprint[:]))
		if err != nil {
			return nil, err
		}
		defer stranger.nc.Close()
		who, err := stranger.ask(ctx, "whoami", nil, silence)
		if err != nil {
			return nil, err
		}
		key = who.KeyID
	}
	return dial(key)
}

func (c *client) subject(operation string) string { return "ownllm.v1.in." + c.key + "." + operation }

// ask is one question and one answer.
func (c *client) ask(ctx context.Context, operation string, payload []byte, timeout time.Duration) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	m, err := c.nc.RequestWithContext(ctx, c.subject(operation), payload)
	if err != nil {
		return answer{}, err // nats.ErrNoResponders: no broker is there
	}
	return decode(m.Data)
}

// chat calls heard with each answer of a reply, in order, up to its end.
func (c *client) chat(ctx context.Context, request []byte, heard func(answer) error) error {
	replies, err := c.nc.SubscribeSync(c.nc.NewInbox())
	if err != nil {
		return err
	}
	defer replies.Unsubscribe() // whoever stops reading has said enough: the GPU stops, too
	if err := c.nc.PublishRequest(c.subject("chat"), replies.Subject, request); err != nil {
		return err
	}
	for seq := 1; ; seq++ {
		m, err := next(ctx, replies)
		if err != nil {
			return err
		}
		a, err := decode(m.Data)
		switch {
		case len(m.Data) == 0 && m.Header.Get("Status") == "503":
			return errors.New("no broker is there")
		case a.Seq != seq && a.Seq != 0:
			return fmt.Errorf("message %d is missing", seq)
		case err != nil:
			return err
		case a.Kind == "progress":
			if err := m.Respond(nil); err != nil { // so the broker knows that we read
				return err
			}
		}
		if err := heard(a); err != nil || a.Kind == "done" {
			return err
		}
	}
}

func next(ctx context.Context, replies *nats.Subscription) (*nats.Msg, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, silence, fmt.Errorf("nothing came for %s", silence))
	defer cancel()
	m, err := replies.NextMsgWithContext(ctx)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return m, err
}

// submit is safe to repeat: the same name is the same submission.
func (c *client) submit(ctx context.Context, name string, request []byte) (answer, error) {
	payload, err := json.Marshal(map[string]any{"id": name, "request": json.RawMessage(request)})
	if err != nil {
		return answer{}, err
	}
	return c.ask(ctx, "submit", payload, silence)
}

func (c *client) result(ctx context.Context, name string) (answer, error) {
	payload, err := json.Marshal(map[string]any{"id": name, "wait_seconds": 20})
	if err != nil {
		return answer{}, err
	}
	for {
		a, err := c.ask(ctx, "result", payload, 20*time.Second+silence)
		if err != nil || a.State == "done" || a.State == "error" {
			return a, err
		}
	}
}

// show prints a reply as it comes, and cancels it after so many chunks, if that isn't 0.
func (c *client) show(ctx context.Context, request []byte, cancelAfter int) error {
	chunks := 0
	defer fmt.Println()
	return c.chat(ctx, request, func(a answer) error {
		switch a.Kind {
		case "chunk":
			for _, choice := range a.Chunk.Choices {
				fmt.Print(choice.Delta.Content)
			}
			if chunks++; chunks == cancelAfter {
				_, err := c.ask(ctx, "cancel", []byte(`{"request_id":"`+a.RequestID+`"}`), silence)
				return err
			}
		case "done":
			for _, choice := range a.Whole.Choices {
				fmt.Print(choice.Message.Content)
			}
			fmt.Fprintf(os.Stderr, `{"request_id":%q,"usage":%s}`+"\n", a.RequestID, a.Usage)
		}
		return nil
	})
}

func run(ctx context.Context, arguments []string) error {
	c, err := connect(ctx)
	if err != nil {
		return err
	}
	defer c.nc.Close()
	argument := func(i int) []byte {
		switch {
		case i >= len(arguments):
			return nil
		case arguments[i] == "-":
			b, _ := io.ReadAll(os.Stdin) // a part of it is refused
			return b
		}
		return []byte(arguments[i])
	}
	var a answer
	switch string(argument(0)) {
	case "chat":
		cancelAfter, _ := strconv.Atoi(string(argument(2)))
		return c.show(ctx, argument(1), cancelAfter)
	case "submit":
		a, err = c.submit(ctx, string(argument(1)), argument(2))
	case "result":
		a, err = c.result(ctx, string(argument(1)))
	case "ask":
		a, err = c.ask(ctx, string(argument(1)), argument(2), silence)
	default:
		err = errors.New("use chat, submit, result or ask")
	}
	if err == nil {
		fmt.Printf("%s\n", a.raw)
	}
	return err
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	err := run(ctx, os.Args[1:])
	cancel()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, err)
	if errors.As(err, new(refused)) {
		os.Exit(1)
	}
	os.Exit(2)
}
