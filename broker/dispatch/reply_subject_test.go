package dispatch_test

import (
	"testing"

	"github.com/ownllm/ownllm/schemas"
)

// The bus lets an agent name any reply subject, so the owner answers into the agent's own
// inbox only, and takes nothing that asks for another.
func TestForgedReplySubject(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	req := request()
	req.Body = `{"model":"` + string(make([]byte, schemas.MaxInlineBody)) + `"}`
	reply := h.start(req)
	d := a.pull()
	eavesdropper := h.server.Connect("eavesdropper")
	everything, err := eavesdropper.SubscribeSync("forged.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := eavesdropper.Flush(); err != nil {
		t.Fatal(err)
	}
	claim := d.encode(schemas.Frame{Kind: schemas.FrameClaim})
	for _, forged := range []string{
		"forged.x", schemas.AgentInboxPrefix(agentB) + ".x", schemas.AgentInboxPrefix(agentA), schemas.AgentInboxPrefix(agentA) + "x.y",
		schemas.HeartbeatSubject(tenant, agentB),
	} {
		sub, err := h.server.Connect("victim").SubscribeSync(forged)
		if err != nil {
			t.Fatal(err)
		}
		if err := sub.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
		for subject, data := range map[string][]byte{
			d.subject(): claim,
			schemas.OutSubject(agentA, d.job.Owner, schemas.NewNonce()):  claim,
			schemas.BodySubject(agentA, d.job.Owner, d.job.Nonce):        schemas.BodyRequest{}.Encode(),
			schemas.BodySubject(agentA, d.job.Owner, schemas.NewNonce()): schemas.BodyRequest{}.Encode(),
		} {
			if err := a.nc.PublishRequest(subject, forged, data); err != nil {
				t.Fatal(err)
			}
		}
	}
	// What follows on the same connection is looked at after all that.
	d.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1})
	if err := eavesdropper.Flush(); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := everything.Pending(); n != 0 {
		t.Errorf("%d answers went to a forged subject", n)
	}
	reply.Close()
}
