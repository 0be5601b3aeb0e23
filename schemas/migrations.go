package schemas

import "embed"

// Migrations holds the SQL migrations of the books, in the folder "migrations", in
// the format of goose: each file has a way up and a way down, and runs in a
// transaction. A file that was released never changes; what is to be changed gets
// the next number.
//
//go:embed migrations/*.sql
var Migrations embed.FS
