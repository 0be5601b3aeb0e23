package backend

import (
	"context"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// openaiModels lists the models of the demo, which tells all in the form of the
// contract, and of other servers that speak OpenAI's protocol, which tell their
// models' ids and, under several names, perhaps more. What isn't told is left to the
// operator: such a server may be a proxy that loads a model for every question, so
// nothing is tried on it.
func (b *Backend) openaiModels(ctx context.Context) ([]listed, error) {
	path := "/v1/models"
	if b.lmStudio {
		path = "/api/v0/models"
	}
	var list struct {
		Data []rawJSON `json:"data"`
	}
	if err := b.get(ctx, path, &list); err != nil {
		return nil, err
	}
	var found []listed
	slots := 0
	for _, raw := range list.Data {
		e := gjson.ParseBytes(raw)
		id := e.Get("id").String()
		if id == "" {
			continue
		}
		found = append(found, listed{
			id:           id,
			capabilities: openaiCapabilities(e),
			window:       firstInt(e, "loaded_context_length", "context_window", "max_model_len", "context_length", "max_context_length"),
			size:         e.Get("size_mb").Int() * 1_000_000,
			created:      e.Get("created").Int(),
			state:        openaiState(e.Get("state").String()),
			detail:       e.Get("detail").String(),
			loadMS:       e.Get("load_ms").Int(),
			continues:    b.kind == Demo && e.Get("continues").Bool(),
		})
		slots = max(slots, int(e.Get("slots").Int()))
	}
	b.setSlots(slots)
	return found, nil
}

func openaiState(s string) schemas.ModelState {
	switch state := schemas.ModelState(s); state {
	case schemas.ModelReady, schemas.ModelCold, schemas.ModelLoading, schemas.ModelFailed:
		return state
	}
	if s == "not-loaded" { // LM Studio
		return schemas.ModelCold
	}
	return schemas.ModelReady
}

func openaiCapabilities(e gjson.Result) schemas.Capabilities {
	c := schemas.Capabilities{Completion: true}
	switch e.Get("type").String() { // LM Studio
	case "embeddings":
		c = schemas.Capabilities{Embedding: true}
	case "vlm":
		c.Vision = true
	}
	told := e.Get("capabilities")
	if told.IsObject() {
		if completion := told.Get("completion"); completion.Exists() {
			c.Completion = completion.Bool()
		}
		c.Vision = c.Vision || told.Get("vision").Bool()
		c.Embedding = c.Embedding || told.Get("embedding").Bool()
		c.Tools = told.Get("tools").Bool()
		c.Thinking = told.Get("thinking").Bool()
		return c
	}
	for _, name := range told.Array() {
		switch name.String() {
		case "tool_use", "tools":
			c.Tools = true
		case "vision", "multimodal":
			c.Vision = true
		case "thinking", "reasoning":
			c.Thinking = true
		case "embedding":
			c.Embedding = true
		}
	}
	return c
}

// firstInt returns the first of the fields that is a positive number.
func firstInt(e gjson.Result, names ...string) int {
	for _, name := range names {
		if n := e.Get(name).Int(); n > 0 {
			return int(n)
		}
	}
	return 0
}
