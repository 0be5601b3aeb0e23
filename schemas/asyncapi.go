package schemas

import _ "embed"

// AsyncAPI is the AsyncAPI 3.0 document, as JSON, of all that travels on the bus. Its
// references to the JSON Schemas are relative: they lie beside it, in the folder "json".
//
//go:embed asyncapi.json
var AsyncAPI []byte
