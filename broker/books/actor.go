package books

import (
	"context"
	"strings"
	"unicode"
)

// Actor is who makes a change, for the audit.
type Actor struct {
	// Name is who it is: "admin" for whoever has the admin token, "system" for OwnLLM
	// itself.
	Name string `json:"name"`
	// Request is the id of the HTTP request; it may be empty.
	Request string `json:"request"`
	// Address is the client's; it may be empty.
	Address string `json:"address"`
}

// systemActor is the name of whoever doesn't say who they are.
const systemActor = "system"

// maxActor bounds each text of an Actor, in bytes.
const maxActor = 200

type actorKey struct{}

// WithActor makes whatever is changed under the context the actor's doing. What can't be
// shown in the texts of an actor is left out.
func WithActor(ctx context.Context, a Actor) context.Context {
	return context.WithValue(ctx, actorKey{}, Actor{shown(a.Name), shown(a.Request), shown(a.Address)})
}

func actorOf(ctx context.Context) Actor {
	a, _ := ctx.Value(actorKey{}).(Actor)
	if a.Name == "" {
		a.Name = systemActor
	}
	return a
}

// shown is the part of a text that can be stored and shown.
func shown(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, text)
	return strings.ToValidUTF8(text[:min(len(text), maxActor)], "")
}
