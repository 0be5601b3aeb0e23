package command

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/ownllm/ownllm/internal/secret"
)

// secretFile returns the secret that a file keeps, and makes one on the first run.
func secretFile(dir, name, prefix string) (secret.String, error) {
	path := filepath.Join(dir, name)
	b, err := os.ReadFile(path)
	if err == nil {
		if s := strings.TrimSpace(string(b)); s != "" {
			return secret.String(s), nil
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	var random [24]byte
	_, _ = rand.Read(random[:]) // never fails, see crypto/rand
	s := prefix + hex.EncodeToString(random[:])
	return secret.String(s), writeFile(path, s)
}

// writeFile writes a file that only its owner may read, in one step: a crash leaves
// the old file or the new one.
func writeFile(path, content string) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.WriteString(content + "\n")
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
