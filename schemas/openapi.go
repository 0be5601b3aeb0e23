package schemas

import _ "embed"

// OpenAPI is the OpenAPI 3.1 document, as JSON, of all that an edge answers over HTTP.
//
//go:embed openapi.json
var OpenAPI []byte
