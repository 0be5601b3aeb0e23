package bus

import (
	"crypto/sha256"
	"encoding/hex"
)

// shortHash is enough of SHA-256 to tell the models of one agent apart.
func shortHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:10])
}
