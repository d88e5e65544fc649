-- Begin a run, or another attempt of one, unless it is active or was begun otherwise.
--
-- KEYS  1 the run, 2 what is done of it, 3 all runs
-- ARGV  1 what is asked for (JSON), 2 the run's id, 3 time now, 4 whether to start over, 5 seconds to keep it
-- Returns {state, attempt, what was asked for before}: 'planning', 'running' or 'merging' as it is now, 'conflict' if it was
-- begun otherwise, 'finished' if it is and its output is not to be replaced.
local call = redis.call
local state, attempt, asked, rows, plan = unpack(call('HMGET', KEYS[1], 'state', 'attempt', 'asked', 'rows', 'plan'))
local active = state == 'planning' or state == 'running' or state == 'merging'
-- What changes nothing of the rows may change.
local function rows_of(text)
  return (string.gsub(string.gsub(text, '"overwrite": %a+', ''), '"max_errors": %w+', ''))
end
attempt = tonumber(attempt) or 0
local replaces = string.find(ARGV[1], '"overwrite": true', 1, true)
if state and ARGV[4] == '0' then
  if state == 'finished' then
    if not replaces then return {'finished', attempt, asked} end
  elseif (active or plan) and rows_of(asked) ~= rows_of(ARGV[1]) then
    return {'conflict', attempt, asked}
  elseif active then
    return {state, attempt, asked}
  end
end
local fresh = not state or not plan or ARGV[4] == '1' or state == 'finished'
if fresh then
  call('DEL', KEYS[1], KEYS[2])
  rows = 0
end
call('HSET', KEYS[1], 'state', 'planning', 'attempt', attempt + 1, 'asked', ARGV[1], 'began_at', ARGV[3],
  'before', rows or 0)
call('HDEL', KEYS[1], 'error', 'ended_at')
call('EXPIRE', KEYS[1], ARGV[5])
call('EXPIRE', KEYS[2], ARGV[5])
call('ZADD', KEYS[3], ARGV[3], ARGV[2])
call('EXPIRE', KEYS[3], ARGV[5])
return {'planning', attempt + 1, ''}
