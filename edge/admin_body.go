package edge

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// adminBodyLimit bounds the body of an admin request, in bytes.
const adminBodyLimit = 1 << 20

// read decodes the body of an admin request into the struct that v points to. A field
// that isn't known is refused: it may be a misspelt limit.
func (e *Edge) read(c *fiber.Ctx, v any) error {
	body, err := boundedBody(c, adminBodyLimit)
	if err != nil {
		return err
	}
	return decode(body, v, true)
}

// readOpen is read for a request of a machine, whose software may be newer than ours: a
// field that isn't known is passed over. limit bounds the body, in bytes.
func (e *Edge) readOpen(c *fiber.Ctx, limit int, v any) error {
	body, err := boundedBody(c, limit)
	if err != nil {
		return err
	}
	return decode(body, v, false)
}

// readIfAny is read for a request that may come without a body.
func (e *Edge) readIfAny(c *fiber.Ctx, v any) error {
	body, err := boundedBody(c, adminBodyLimit)
	if err != nil || len(body) == 0 {
		return err
	}
	return decode(body, v, true)
}

func boundedBody(c *fiber.Ctx, limit int) ([]byte, error) {
	var body io.Reader = strings.NewReader(string(c.Request().Body()))
	if stream := c.Context().RequestBodyStream(); stream != nil {
		body = stream
	}
	b, err := io.ReadAll(io.LimitReader(body, int64(limit)+1))
	switch {
	case len(b) > limit:
		return nil, schemas.Errorf(schemas.CodeRequestTooLarge, "The body is larger than the %d bytes that such a request may have.", limit)
	case err != nil:
		return nil, schemas.Errorf(schemas.CodeInvalidJSON, "The body ended early: %d bytes of it came.", len(b))
	}
	return b, nil
}

// decode decodes a JSON object into the struct that v points to. A field that isn't known is
// refused if the struct is closed.
func decode(body []byte, v any, closed bool) error {
	var fields map[string]json.RawMessage
	if !utf8.Valid(body) || json.Unmarshal(body, &fields) != nil || fields == nil {
		return schemas.Errorf(schemas.CodeInvalidJSON, "The body isn't a JSON object in UTF-8.")
	}
	known := fieldNames(reflect.TypeOf(v).Elem())
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		// One by one, so that it is known which is wrong.
		if !slices.Contains(known, name) {
			if !closed {
				continue
			}
			name = clip(name)
			return refuse(name, "There is no field %q; there are: %s.", name, strings.Join(known, ", "))
		}
		one, err := json.Marshal(map[string]json.RawMessage{name: fields[name]})
		if err == nil {
			err = json.Unmarshal(one, v)
		}
		if err != nil {
			return wrongField(name, err)
		}
	}
	return nil
}

// wrongField says what is wrong with the value of a field.
func wrongField(name string, err error) error {
	var wrongType *json.UnmarshalTypeError
	var amount *adminapi.CentsError
	var moment *time.ParseError
	switch {
	case errors.As(err, &wrongType):
		return refuse(name, "%s can't be a JSON %s.", name, clip(wrongType.Value))
	case errors.As(err, &amount):
		return refuse(name, "%s %v.", name, amount)
	case errors.As(err, &moment):
		return refuse(name, "%s must be an RFC 3339 time, like 2026-12-31T18:00:00Z.", name)
	}
	return refuse(name, "%s has a wrong type.", name)
}

// clip shortens a text of the client's for a message.
func clip(text string) string {
	const shown = 64
	if r := []rune(text); len(r) > shown {
		return string(r[:shown]) + "…"
	}
	return text
}

// fieldNames are the names that the fields of a wire type have in JSON.
func fieldNames(t reflect.Type) []string {
	names := make([]string, t.NumField())
	for i := range names {
		names[i], _, _ = strings.Cut(t.Field(i).Tag.Get("json"), ",")
	}
	return names
}
