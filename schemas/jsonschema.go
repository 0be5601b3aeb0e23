package schemas

import "embed"

// JSON holds the JSON Schemas (draft 2020-12) of all that travels on the bus, and of
// the error envelope of HTTP, in the folder "json". What a receiver doesn't know it
// ignores, so all of them are open: a later version may add a field, and never change
// or take away one.
//
//go:embed json/*.json
var JSON embed.FS
