package adminapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
)

// ReadyFile is the name of the file, in the data directory, in which a running
// `ownllm up` says how to reach it.
const ReadyFile = "ready.json"

// Ready is the content of ReadyFile. It holds secrets, so the file is its owner's
// alone, and the log gets none of them.
type Ready struct {
	PID int `json:"pid"`
	// BaseURL is the OpenAI-compatible API, "http://127.0.0.1:9191/v1", and APIKey a
	// key for it, the same on every run.
	BaseURL string `json:"base_url"`
	APIKey  string `json:"api_key"`
	// AdminURL is the admin API, "http://127.0.0.1:9191/api/v1".
	AdminURL   string `json:"admin_url"`
	AdminToken string `json:"admin_token"`
	// OpsURL serves /metrics, /healthz and /readyz.
	OpsURL      string `json:"ops_url"`
	NATSURL     string `json:"nats_url"`
	DatabaseURL string `json:"database_url"`
	// Models are the ids that answered when the file was written.
	Models []string `json:"models"`
}

// LogValue implements slog.LogValuer.
func (r Ready) LogValue() slog.Value {
	return slog.GroupValue(slog.Int("pid", r.PID), slog.String("base_url", r.BaseURL),
		slog.String("admin_url", r.AdminURL), slog.String("ops_url", r.OpsURL))
}

// Write writes the file into dir, mode 0600, in one step: a reader sees the old
// file or the new one, whole.
func (r Ready) Write(dir string) error {
	if r.Models == nil {
		r.Models = []string{}
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", ReadyFile, err)
	}
	f, err := os.CreateTemp(dir, ReadyFile+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", ReadyFile, err)
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, ReadyFile))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", ReadyFile, err), os.Remove(f.Name()))
	}
	return nil
}

// ReadReady reads the file in dir. If there is none the error is fs.ErrNotExist.
func ReadReady(dir string) (Ready, error) {
	path := filepath.Join(dir, ReadyFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return Ready{}, err
	}
	var r Ready
	if err := json.Unmarshal(b, &r); err != nil {
		return Ready{}, fmt.Errorf("read %s: %w", path, err)
	}
	return r, nil
}

// Remove removes the file in dir, if it still is the one of this PID: a process that
// stops late must not take its successor's away.
func (r Ready) Remove(dir string) error {
	now, err := ReadReady(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && now.PID != r.PID {
		return nil
	}
	if err := os.Remove(filepath.Join(dir, ReadyFile)); err != nil {
		return fmt.Errorf("remove %s: %w", ReadyFile, err)
	}
	return nil
}
