package keyring

import "github.com/ownllm/ownllm/broker/books"

// Judge returns what is wrong with an identity that the books have just told, nil if the key
// is valid: the same *schemas.Error as of Authenticate.
func Judge(id books.Identity) error {
	if e := judge(&id, "", id.AsOf); e != nil {
		return e
	}
	return nil
}
